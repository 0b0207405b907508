"""Published MoE training runs on NVIDIA GPUs as data, and predictions beside their figures."""
