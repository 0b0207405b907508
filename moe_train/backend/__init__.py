"""Backends behind one protocol: ``cuda`` (NCCL, TransformerEngine or torch) and ``cpu`` (gloo).

Importing this package imports no torch; a backend's own modules do.

protocol: what a backend has to do; cpu, cuda: the two that do it; select: which one.
torch_kernels: Megatron's modules on plain torch; kernels: those or TransformerEngine's. groups:
the world and Megatron's process groups; rendezvous: ranks meet in the launcher's store; consensus:
values compared there; local_group: groups of one rank. patches: every patch of Megatron and torch.
device: torch's state of a thread, copies to the host. memory: out-of-memory errors recognized.
"""
