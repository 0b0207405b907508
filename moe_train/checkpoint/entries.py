"""A rank's state as entries: what it is called in a checkpoint, and where its values are.

Nothing is copied to describe a state. Megatron plans on stand-ins without memory (``meta``), and
the values of an entry are fetched when its bytes are written, or set as they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from moe_train.checkpoint.staging import Staging

type Sharded = ShardedTensor | ShardedTensorFactory
type Tree = dict[str, Any]
"""Entries in nested dictionaries; their order is that of the files."""


@dataclass(eq=False)
class Entry:
    """A tensor that this rank holds whole, which may be several items of a checkpoint."""

    sharded: Sharded
    """Its place in the global tensor; its data does not count."""
    dtype: torch.dtype
    """Of the checkpoint."""
    live: torch.Tensor
    """The values themselves, in any dtype, or a view of them."""

    @property
    def shape(self) -> torch.Size:
        """Of this rank's part."""
        return self.live.shape

    def on(self, tensor: torch.Tensor) -> Sharded:
        """The sharded tensor, or the factory of several, with ``tensor`` for its data."""
        if isinstance(self.sharded, ShardedTensorFactory):
            return replace(self.sharded, data=tensor)
        return replace(self.sharded, data=tensor, dtype=tensor.dtype)

    def items(self, tensor: torch.Tensor) -> list[ShardedTensor]:
        """The sharded tensors that this entry is in a checkpoint: views of ``tensor``."""
        sharded = self.on(tensor)
        if isinstance(sharded, ShardedTensorFactory):
            return list(nested_values({"": sharded.build()}))
        return [sharded]

    def stand_in(self) -> torch.Tensor:
        """A tensor of this shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def target(self) -> torch.Tensor:
        """Where values that are read go; :meth:`store` has the last word."""
        return self.live

    def store(self, values: torch.Tensor, through: Staging) -> None:
        """Take over a filled :meth:`target`."""


def stand_ins(tree: Tree) -> dict[str, Any]:
    """``tree`` as a sharded state dict for Megatron to plan on."""
    planned: dict[str, Any] = dict_list_map_outplace(lambda e: e.on(e.stand_in()), tree)
    return planned


def listed(tree: Tree) -> Iterator[Entry]:
    """All entries, in order."""
    yield from nested_values(tree)
