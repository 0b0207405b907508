"""From files to a rank's entries: one parameter after the other, in any layout.

Items inside the ``.distcp`` files are read by ``torch.load(weights_only=True)``, which builds
tensors only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moe_train.checkpoint import staging
from moe_train.checkpoint.entries import Tree, listed
from moe_train.checkpoint.index import read_index
from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.staging import Staging
from moe_train.checkpoint.tensors import check_complete, split
from moe_train.checkpoint.together import together
from moe_train.errors import CheckpointError

type Where = tuple[str, tuple[int, ...]]
"""Key of a global tensor and the place of a part in it."""

OTHER = "resume from another checkpoint: checkpoint.resume=PATH"


def read_entries(tree: Tree, folder: Path, manifest: Manifest) -> None:
    """Set the values of ``tree``; collective, and one outcome for all ranks.

    What is read passes through the host one item at a time, so that no more than an item and a
    parameter are there at once, and a piece on the device.

    Raises:
        CheckpointError: the index is malformed, a tensor is missing or has another shape, an
            item is no tensor.
        MemoryFault: a rank has no room for a piece.
    """
    together(lambda: check_complete(split(tree)), folder, "does not fit this model", OTHER)
    together(lambda: _fill(tree, folder, manifest), folder, "cannot be loaded", OTHER)


@torch.no_grad()
def _fill(tree: Tree, folder: Path, manifest: Manifest) -> None:
    through = Staging()
    with reader(folder, manifest) as opened:
        metadata = opened.read_metadata()
        opened.set_up_storage_reader(metadata, False)
        reads = planned(tree, metadata)
        for entry in listed(tree):
            target = entry.target()
            for item in entry.items(target):
                place = _Place(item, through)
                opened.read_data(LoadPlan(reads[_where(item)]), place).wait()
            entry.store(target, through)


def planned(tree: Tree, metadata: Metadata) -> dict[Where, list[ReadItem]]:
    """What to read from where, for every item of ``tree``.

    Raises:
        CheckpointError: a tensor is not there, has another shape or does not fill its item.
    """
    wanted: dict[str, dict[Where, ShardedTensor]] = {}
    for entry in listed(tree):
        for item in entry.items(entry.stand_in()):
            wanted.setdefault(item.key, {})[_where(item)] = item
    found: dict[Where, list[ReadItem]] = {}
    for key, items in wanted.items():
        stored, shape = (
            metadata.state_dict_metadata.get(key),
            next(iter(items.values())).global_shape,
        )
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(key, "is not in the checkpoint")
        if tuple(stored.size) != tuple(shape):
            raise CheckpointError(
                key, f"has shape {tuple(stored.size)} in the checkpoint and {tuple(shape)} here"
            )
        chunks = [
            ChunkStorageMetadata(torch.Size(item.global_offset), torch.Size(_sizes(item)))
            for item in items.values()
        ]
        # One call a tensor: each looks at all the parts that are stored of it.
        for read in create_read_items_for_chunk_list(key, stored, chunks):
            assert read.dest_index.offset is not None
            found.setdefault((key, tuple(read.dest_index.offset)), []).append(read)
        for where, item in items.items():
            filled = sum(math.prod(read.lengths) for read in found.setdefault(where, []))
            if filled != math.prod(_sizes(item)):
                raise CheckpointError(key, f"is not whole at {where[1]}")
    return found


def _where(item: ShardedTensor) -> Where:
    return item.key, tuple(item.global_offset)


def _sizes(item: ShardedTensor) -> tuple[int, ...]:
    """Of the local part; Megatron prepends axes that local tensors do not have."""
    sizes: tuple[int, ...] = (1,) * item.prepend_axis_num + tuple(item.local_shape)
    return sizes


class _Place(DefaultLoadPlanner):
    """Where torch's reader puts what it reads of one sharded tensor."""

    def __init__(self, item: ShardedTensor, through: Staging) -> None:
        super().__init__()
        self._item, self._staging = item, through
        assert item.data is not None
        self._target = item.data.view(_sizes(item))
        self._part: torch.Tensor | None = None

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Memory on the host for a read: the target itself where that is one."""
        part: torch.Tensor = self._target
        for axis, (begin, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(axis, begin, length)
        if staging.on_host(part):
            self._part = None
            return part
        self._part = part
        return staging.host_empty(part.shape, self._item.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Bring what was read to its place."""
        if self._part is not None:
            self._staging.to_live(tensor, self._part)

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Indices name tensors only."""
        raise CheckpointError(self._item.key, "is no tensor")


@contextmanager
def reader(folder: Path, manifest: Manifest) -> Iterator[CachedMetadataFileSystemReader]:
    """Torch's reader for a checkpoint, with the checked JSON index for its metadata.

    Megatron's reader has a cache of metadata by path: with this one's in it, it will not look for
    a pickle, and verified checkpoints have none.

    Raises:
        CheckpointError: the index is malformed.
    """
    cache, key = CachedMetadataFileSystemReader._metadata_cache, os.path.abspath(folder)
    cache[key] = read_index(folder, manifest)
    try:
        yield CachedMetadataFileSystemReader(str(folder))
    finally:
        del cache[key]
