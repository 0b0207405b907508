"""Megatron-Core on a CPU with gloo: patches, streams, groups that share a device.

backend: `CpuBackend`. torch_cuda: streams, events and the rest of torch.cuda that Megatron calls.
gloo: groups that share one device, collectives of uneven sizes.
"""
