"""What a checkpoint holds of a rank: model, optimizer and random states, as local shards.

Tensors only, with the same keys on every backend, so that no pickle is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from moe_train.checkpoint import optimizer_state
from moe_train.checkpoint.shards import LocalShard, Sharded, StateDict


def checkpoint_state(chunks: Sequence[Any], optimizer: Any) -> tuple[StateDict, list[int]]:
    """All shards of this rank, and the sizes of its random states for the manifest.

    Args:
        chunks: the model's chunks on this rank (virtual pipeline stages).
    """
    sharded = sharded_model_state(chunks)
    state = model_state(chunks, sharded)
    state["optimizer"] = {
        name: optimizer_state.state_shards(optimizer, sharded, name)
        for name in optimizer_state.state_names(optimizer)
    }
    packed, sizes = pack_rng()
    state["rng"] = rng_shard(packed)
    return state, sizes


def sharded_model_state(chunks: Sequence[Any]) -> dict[str, dict[str, Sharded]]:
    """Sharded tensors of this rank's chunks, by chunk; their data are the parameters themselves.

    Megatron adds ``_extra_state`` objects (TE's fp8 scaling history): they are pickles, only
    one backend has them, and scaling recovers within steps, so they are left out.
    """
    return {
        f"chunk{index}": {
            name: value
            for name, value in chunk.sharded_state_dict().items()
            if isinstance(value, (ShardedTensor, ShardedTensorFactory))
        }
        for index, chunk in enumerate(chunks)
    }


def model_state(chunks: Sequence[Any], sharded: dict[str, dict[str, Sharded]]) -> StateDict:
    """The weights and buffers of this rank's chunks.

    Args:
        sharded: :func:`sharded_model_state`'s of the same chunks.
    """
    held = {id(value.data) for state in sharded.values() for value in state.values()}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            assert id(parameter) in held, f"{name} is in no checkpoint"
    return {
        chunk: {
            name: LocalShard(value.without_data(), value.data.dtype, value.data.detach())
            for name, value in state.items()
        }
        for chunk, state in sharded.items()
    }


def pack_rng() -> tuple[torch.Tensor, list[int]]:
    """This rank's random states as bytes, and the size of each.

    torch's, the device's, and those of Megatron's tracker in the order of their names.
    """
    tracker = get_cuda_rng_tracker().get_states()
    states = [torch.get_rng_state(), torch.cuda.get_rng_state()]
    states += [tracker[name] for name in sorted(tracker)]
    return torch.cat([state.cpu() for state in states]), [state.numel() for state in states]


def unpack_rng(packed: torch.Tensor, sizes: list[int]) -> None:
    """Set this rank's random states from :func:`pack_rng`'s result."""
    states = list(torch.split(packed.view(-1), sizes))
    torch.set_rng_state(states[0].clone())
    torch.cuda.set_rng_state(states[1].clone())
    tracker = get_cuda_rng_tracker()
    names = sorted(tracker.get_states())
    tracker.set_states({n: s.clone() for n, s in zip(names, states[2:], strict=True)})


def rng_shard(packed: torch.Tensor) -> LocalShard:
    """One row per rank of the tensor ``rng``; meaningful only for the layout that wrote it."""
    row = packed.view(1, -1)
    offsets = (0, dist.get_rank(), dist.get_world_size())
    sharded = ShardedTensor.from_rank_offsets("rng", row, offsets)
    return LocalShard(sharded.without_data(), row.dtype, row)
