"""Megatron-Core on a CPU with gloo: patches, spec provider, grouped experts, Adam."""
