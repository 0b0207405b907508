"""Random states of a rank as one tensor, so that no pickle is needed to keep them."""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from moe_train.checkpoint.entries import Entry


def pack() -> tuple[torch.Tensor, list[int]]:
    """This rank's states as bytes, and the size of each: torch's, the device's, the tracker's
    in the order of their names."""
    tracker = get_cuda_rng_tracker().get_states()
    states = [torch.get_rng_state(), torch.cuda.get_rng_state()]
    states += [tracker[name] for name in sorted(tracker)]
    return torch.cat([state.cpu() for state in states]), [state.numel() for state in states]


def unpack(packed: torch.Tensor, sizes: list[int]) -> None:
    """Set this rank's states from :func:`pack`'s result."""
    states = list(torch.split(packed.view(-1), sizes))
    torch.set_rng_state(states[0].clone())
    torch.cuda.set_rng_state(states[1].clone())
    tracker = get_cuda_rng_tracker()
    names = sorted(tracker.get_states())
    tracker.set_states({n: s.clone() for n, s in zip(names, states[2:], strict=True)})


def entry(packed: torch.Tensor, rank: int, world: int) -> Entry:
    """One row per rank; meaningful only for the layout that wrote it."""
    row = packed.view(1, -1)
    sharded = ShardedTensor.from_rank_offsets("rng", row, (0, rank, world))
    return Entry(sharded.without_data(), row.dtype, row)
