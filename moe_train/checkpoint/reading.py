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
        for entry in listed(tree):
            target = entry.target()
            for item in entry.items(target):
                place = _Place(item, through)
                opened.read_data(LoadPlan(place.reads(metadata)), place).wait()
            entry.store(target, through)


class _Place(DefaultLoadPlanner):
    """Where torch's reader puts what it reads of one sharded tensor."""

    def __init__(self, item: ShardedTensor, through: Staging) -> None:
        super().__init__()
        self._item, self._staging = item, through
        assert item.data is not None
        # Megatron prepends axes that local tensors do not have.
        self._sizes = (1,) * item.prepend_axis_num + tuple(item.local_shape)
        self._target = item.data.view(self._sizes)
        self._part: torch.Tensor | None = None

    def reads(self, metadata: Metadata) -> list[ReadItem]:
        """What to read from where.

        Raises:
            CheckpointError: the tensor is not there, has another shape or does not fill this one.
        """
        key = self._item.key
        stored = metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(key, "is not in the checkpoint")
        if tuple(stored.size) != tuple(self._item.global_shape):
            raise CheckpointError(
                key,
                f"has shape {tuple(stored.size)} in the checkpoint and "
                f"{tuple(self._item.global_shape)} in this model",
            )
        chunk = ChunkStorageMetadata(torch.Size(self._item.global_offset), torch.Size(self._sizes))
        found = create_read_items_for_chunk_list(key, stored, [chunk])
        if sum(math.prod(read.lengths) for read in found) != math.prod(self._sizes):
            raise CheckpointError(key, f"is not whole at {tuple(chunk.offsets)}")
        return list(found)

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
