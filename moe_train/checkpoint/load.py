"""Loads a checkpoint into a model and optimizer of any layout, one parameter at a time.

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
import torch.distributed as dist
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

from moe_train.checkpoint import optimizer_state, staging
from moe_train.checkpoint.collective import run_on_all_ranks
from moe_train.checkpoint.index import read_index
from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.shards import StateDict, shards_of
from moe_train.checkpoint.staging import Staging
from moe_train.checkpoint.state_dict import (
    model_state,
    pack_rng,
    rng_shard,
    sharded_model_state,
    unpack_rng,
)
from moe_train.checkpoint.write import check_sharding, plan_sharded
from moe_train.errors import CheckpointError

type Place = tuple[str, tuple[int, ...]]
"""Key of a global tensor and the global offset of a part of it."""

_OTHER_CHECKPOINT = "resume from another checkpoint: checkpoint.resume=PATH"


def load_checkpoint(
    folder: Path, manifest: Manifest, *, chunks: list[Any], optimizer: Any | None, layout: str
) -> bool:
    """Load weights, and optimizer and random states when ``optimizer`` is given; collective.

    Args:
        layout: this run's layout tag. Random states belong to one layout: in another one they
            stay as seeded, which the result tells.

    Returns:
        Whether the random states were restored.

    Raises:
        CheckpointError: a tensor is missing, damaged or has another shape; on every rank.
    """
    read_state(model_state(chunks, sharded_model_state(chunks)), folder, manifest)
    if optimizer is None:
        return False
    _load_optimizer(folder, manifest, chunks, optimizer)
    return _load_rng(folder, manifest, layout)


def _load_optimizer(folder: Path, manifest: Manifest, chunks: list[Any], optimizer: Any) -> None:
    names = optimizer_state.state_names(optimizer)

    def initialise() -> None:
        optimizer_state.initialise_state(optimizer)
        missing = set(names) - set(manifest.optimizer_states)
        if missing == {optimizer_state.MASTER}:
            # Written without master copies: the weights themselves are the master.
            optimizer_state.master_from_model(optimizer)
        elif missing:
            problem = f"has no optimizer state {min(missing)}"
            raise CheckpointError(str(folder), problem, _OTHER_CHECKPOINT)

    run_on_all_ranks(initialise, folder, "cannot be loaded", _OTHER_CHECKPOINT)
    for name in names:
        if name in manifest.optimizer_states:
            sharded = sharded_model_state(chunks)
            state = optimizer_state.state_shards(optimizer, sharded, name)
            read_state({"optimizer": state}, folder, manifest)
    optimizer_state.set_optimizer_step(optimizer, manifest.optimizer_step)


def _load_rng(folder: Path, manifest: Manifest, layout: str) -> bool:
    packed, sizes = pack_rng()
    world = dist.get_world_size()
    if (manifest.layout, manifest.world, manifest.rng_sizes) != (layout, world, sizes):
        return False
    read_state({"rng": rng_shard(packed)}, folder, manifest)
    unpack_rng(packed, sizes)
    return True


def read_state(state: StateDict, folder: Path, manifest: Manifest) -> None:
    """Set the values of ``state``; collective, and one outcome for all ranks.

    What is read passes through the host one item at a time, so that no more than an item and a
    parameter are there at once, and a piece on the device.

    Raises:
        CheckpointError: the index is malformed, a tensor is missing or has another shape, an
            item is no tensor.
        MemoryFault: a rank lacks memory for a piece.
    """
    for work, failure in (
        (lambda: check_sharding(plan_sharded(state)), "does not fit this model"),
        (lambda: _read(state, folder, manifest), "cannot be loaded"),
    ):
        run_on_all_ranks(work, folder, failure, _OTHER_CHECKPOINT)


@torch.no_grad()
def _read(state: StateDict, folder: Path, manifest: Manifest) -> None:
    through = Staging()
    with reader(folder, manifest) as opened:
        metadata = opened.read_metadata()
        opened.set_up_storage_reader(metadata, False)
        reads = plan_reads(state, metadata)
        for shard in shards_of(state):
            buffer = shard.load_buffer()
            for tensor in shard.sharded_tensors(buffer):
                planner = _LoadPlanner(tensor, through)
                opened.read_data(LoadPlan(reads[_place(tensor)]), planner).wait()
            shard.store(buffer, through)


def plan_reads(state: StateDict, metadata: Metadata) -> dict[Place, list[ReadItem]]:
    """What to read from where, for every sharded tensor of ``state``.

    Raises:
        CheckpointError: a tensor is not there, has another shape or is not stored as a whole.
    """
    wanted: dict[str, dict[Place, ShardedTensor]] = {}
    for shard in shards_of(state):
        for tensor in shard.sharded_tensors(shard.meta()):
            wanted.setdefault(tensor.key, {})[_place(tensor)] = tensor
    reads: dict[Place, list[ReadItem]] = {}
    for key, tensors in wanted.items():
        stored = metadata.state_dict_metadata.get(key)
        shape = tuple(next(iter(tensors.values())).global_shape)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(key, "is not in the checkpoint")
        if tuple(stored.size) != shape:
            raise CheckpointError(
                key, f"has shape {tuple(stored.size)} in the checkpoint and {shape} here"
            )
        local = [
            ChunkStorageMetadata(torch.Size(tensor.global_offset), torch.Size(local_sizes(tensor)))
            for tensor in tensors.values()
        ]
        # One call a tensor: each looks at all the shards that are stored of it.
        for read in create_read_items_for_chunk_list(key, stored, local):
            assert read.dest_index.offset is not None
            reads.setdefault((key, tuple(read.dest_index.offset)), []).append(read)
        for place, tensor in tensors.items():
            filled = sum(math.prod(read.lengths) for read in reads.setdefault(place, []))
            if filled != math.prod(local_sizes(tensor)):
                raise CheckpointError(key, f"is not whole at {place[1]}")
    return reads


def _place(tensor: ShardedTensor) -> Place:
    return tensor.key, tuple(tensor.global_offset)


def local_sizes(tensor: ShardedTensor) -> tuple[int, ...]:
    """Shape of the local part; Megatron prepends axes that local tensors do not have."""
    sizes: tuple[int, ...] = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return sizes


class _LoadPlanner(DefaultLoadPlanner):
    """Tells torch's reader where to put what it reads of one sharded tensor."""

    def __init__(self, tensor: ShardedTensor, through: Staging) -> None:
        super().__init__()
        self._tensor, self._staging = tensor, through
        assert tensor.data is not None
        self._target = tensor.data.view(local_sizes(tensor))
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
        return staging.host_empty(part.shape, self._tensor.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Copy what was read to the device."""
        if self._part is not None:
            self._staging.to_live(tensor, self._part)

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Refuse: indices name tensors only."""
        raise CheckpointError(self._tensor.key, "is no tensor")


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
