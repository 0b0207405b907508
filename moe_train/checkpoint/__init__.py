"""Sharded checkpoints that any layout can load.

select: which one is resumed. save: a save from its plan to its commit. load: into any layout.
state_dict, optimizer_state, shards: what a rank holds; staging: how it crosses to the host. write:
bytes of its shards. index, manifest, digests: what a checkpoint says of itself, and how it is
verified. folders: commit and pruning. collective: work that fails on all ranks or on none.
weights: read in one process, without Megatron.
"""
