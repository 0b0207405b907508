"""Megatron-Core on NVIDIA GPUs with NCCL, on TransformerEngine's kernels or torch's own."""
