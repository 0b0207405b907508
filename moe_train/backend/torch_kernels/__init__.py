"""Megatron's modules on plain torch, for CPU and CUDA: norms, attention, grouped experts, Adam."""
