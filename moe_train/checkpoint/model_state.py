"""The model's state: tensors only, the same keys on every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from moe_train.checkpoint.entries import Entry, Sharded, Tree


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


def model_entries(chunks: Sequence[Any], states: dict[str, dict[str, Sharded]]) -> Tree:
    """The weights and buffers of this rank's chunks that a checkpoint holds.

    Args:
        states: :func:`sharded_model_state`'s of the same chunks.
    """
    held = {id(value.data) for state in states.values() for value in state.values()}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            assert id(parameter) in held, f"{name} is in no checkpoint"
    return {
        chunk: {
            name: Entry(value.without_data(), value.data.dtype, value.data.detach())
            for name, value in state.items()
        }
        for chunk, state in states.items()
    }
