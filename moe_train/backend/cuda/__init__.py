"""Megatron-Core on NVIDIA GPUs with NCCL, on TransformerEngine's kernels or torch's own.

backend: `CudaBackend`. environment: variables set before CUDA starts. devices: GPUs by nvidia-smi,
without torch; probe: GPUs by torch, in a process of its own. ranks: how many a node starts.
"""
