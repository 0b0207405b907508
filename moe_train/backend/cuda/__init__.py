"""Megatron-Core on NVIDIA GPUs with NCCL and TransformerEngine; nothing is patched."""
