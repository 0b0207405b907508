"""The model's sharded state: tensors only, the same keys on every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

StateDict = dict[str, Any]


def sharded_model_state(chunks: Sequence[Any]) -> StateDict:
    """Sharded tensors of this rank's chunks, by chunk.

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


@torch.no_grad()
def load_model_state(chunks: Sequence[Any], loaded: StateDict) -> None:
    """Copy loaded tensors into the modules (those of ``sharded_model_state``'s shape)."""
    for index, chunk in enumerate(chunks):
        problems = chunk.load_state_dict(loaded[f"chunk{index}"], strict=False)
        missing = [key for key in problems.missing_keys if not key.endswith("_extra_state")]
        assert not missing and not problems.unexpected_keys, problems
