"""Megatron-Core on a CPU with gloo: patches, streams, groups that share a device."""
