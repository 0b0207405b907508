"""Writes this rank's shards to its ``.distcp`` file, planned by Megatron, without a pickled index.

Megatron's own ``dist_checkpointing.save`` adds an index and a common state that are pickles. Its
planner decides here which rank writes what; its writer, which would bring everything to the host
before the first byte is written, is not used: values are fetched one item at a time as the file
reaches them. The bytes are those of its writer.
"""

from __future__ import annotations

import os
import queue
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import (
    determine_global_metadata,
    validate_sharding_integrity,
)
from torch.distributed.checkpoint.filesystem import (
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from moe_train.checkpoint.digests import FileEntry, HashingStream, block_size
from moe_train.checkpoint.shards import (
    FlatShard,
    LocalShard,
    ParameterGather,
    StateDict,
    meta_state_dict,
    shards_of,
)
from moe_train.checkpoint.staging import Staging

type Written = tuple[Metadata, list[list[WriteResult]]]
"""torch's metadata of all tensors, and where each rank wrote what."""


class _SaveStrategy(TorchDistSaveShardedStrategy):
    """Keeps what torch would pickle into ``.metadata``, on the coordinating rank."""

    written: Written | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        def keep(metadata: Metadata, results: list[list[WriteResult]]) -> None:
            self.written = metadata, results

        writer.finish = keep
        return super()._get_save_and_finalize_callbacks(writer, *args)


def plan_sharded(state: StateDict) -> dict[str, Any]:
    """The sharded tensors of ``state``, its factories applied, on ``meta`` tensors."""
    sharded, common = save_preprocess(meta_state_dict(state), False)
    assert not common, f"not tensors: {sorted(common)}"
    return dict(sharded)


def check_sharding(sharded: dict[str, Any]) -> None:
    """Check that every part of every tensor is on exactly one rank; collective.

    Raises:
        CheckpointingException: Megatron's, on the rank that checks (0).
    """
    validate_sharding_integrity(determine_global_metadata(sharded)[1])


def bytes_to_write(sharded: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes (the others hold replicas of the rest)."""
    return sum(
        tensor.data.numel() * tensor.data.element_size()
        for tensor in nested_values(sharded)
        if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id)
    )


class ItemValues:
    """The values of this rank's write items on the host, one by one, in the order of the file.

    Args:
        state: every rank of a data-parallel group has the same flat shards in it, in the same
            order, and their ranges are gathered.

    Raises:
        torch.OutOfMemoryError: the device lacks memory for a piece.
    """

    def __init__(self, state: StateDict) -> None:
        self._staging = Staging()
        self._shards: dict[tuple[str, tuple[int, ...]], tuple[LocalShard, int]] = {}
        by_key: dict[str, list[FlatShard]] = {}
        for shard in shards_of(state):
            tensors = shard.sharded_tensors(shard.meta())
            for number, tensor in enumerate(tensors):
                if is_main_replica(tensor.replica_id):
                    self._shards[tensor.key, tuple(tensor.global_offset)] = shard, number
            if isinstance(shard, FlatShard):
                # Megatron writes all parts of a global tensor before the next one's.
                by_key.setdefault(tensors[0].key, []).append(shard)
        flat = [shard for shards in by_key.values() for shard in shards]
        self._parameters = ParameterGather(flat, self._staging)

    def get(self, item: WriteItem, *, copy: bool = False) -> torch.Tensor:
        """Contiguous values of an item, in a storage of their own.

        Args:
            copy: never the state itself, which may change before they are written.
        """
        assert item.index.offset is not None
        shard, number = self._shards[item.index.fqn, tuple(item.index.offset)]
        whole = self._parameters.gather(shard) if isinstance(shard, FlatShard) else shard.tensor
        part = shard.sharded_tensors(whole)[number].data
        assert part is not None
        return self._staging.to_host(part, shard.dtype, copy=copy)

    def finish(self) -> None:
        """Serve the peers' remaining broadcasts; on every rank, whatever went wrong."""
        self._parameters.finish()


class ShardWriter:
    """Writes this rank's file into ``folder``.

    Opening and :meth:`finish` are collective over the world. :meth:`stage`, or :meth:`write`
    without it, is collective over data-parallel groups whose optimizers hold flat shards: every
    rank has to call it. After :meth:`stage`, :meth:`write` may run in a thread beside other
    collectives.

    Args:
        sharded: :func:`plan_sharded`'s result for the state that ``values`` are of.
        files: that the checkpoint will have, about.
    """

    def __init__(
        self, values: ItemValues, sharded: dict[str, Any], folder: Path, *, files: int
    ) -> None:
        self.entries: dict[str, FileEntry] = {}
        """This rank's files in the manifest, once they are written."""
        self._values, self._expected_files = values, files
        self._staged: dict[int, torch.Tensor] = {}
        # Megatron's writer threads answer through a Manager, which only its own asynchronous
        # saving needs: a spawned copy of the program per rank (340 MB), that outlives a rank
        # which is killed.
        self._results: queue.Queue[Any] = queue.Queue()
        filesystem_async._results_queue = self._results
        self._strategy = _SaveStrategy()
        self._request = self._strategy.async_save(sharded, folder, async_strategy="mcore")
        arguments = list(self._request.async_fn_args)
        # Buckets: path, name of the file, (objects, tensors); one for each file.
        self._buckets: list[Any] = arguments[1] if arguments else []
        assert not any(objects for _, _, (objects, _) in self._buckets), "not tensors"

    def stage(self) -> None:
        """Copy the values to the host, so that the state may change while they are written.

        Needs host memory for this rank's part of a checkpoint.

        Raises:
            torch.OutOfMemoryError: the device lacks memory for a piece.
        """
        try:
            for _, _, (_, tensors) in self._buckets:
                for item, _ in tensors:
                    self._staged[id(item)] = self._values.get(item, copy=True)
        finally:
            self._values.finish()

    def write(self) -> None:
        """Write, hash and flush this rank's files.

        Raises:
            OSError: the disk refuses.
            torch.OutOfMemoryError: the device lacks memory for a piece.
        """
        written = {}
        try:
            for number, (path, name, (_, tensors)) in enumerate(self._buckets):
                written[number] = self._write_file(path, name, tensors)
        finally:
            self._values.finish()
        if self._buckets:
            self._results.put(written)

    def _write_file(self, path: str, name: str, tensors: list[Any]) -> list[WriteResult]:
        size = sum(meta.numel() * meta.itemsize for _, meta in tensors)
        results = []
        with open(path, "wb") as plain:
            stream = HashingStream(plain, block_size(size, self._expected_files))
            for item, meta in tensors:
                values = self._staged.pop(id(item), None)
                if values is None:
                    values = self._values.get(item)
                results.append(
                    _write_item(
                        _StorageWriterTransforms(),
                        stream,  # type: ignore[arg-type]
                        values.view(meta.shape),
                        item,
                        name,
                        SerializationFormat.TORCH_SAVE,
                    )
                )
            plain.flush()
            os.fsync(plain.fileno())
        self.entries[name] = stream.entry()
        return results

    def finish(self) -> Written | None:
        """Gather what was written where, once every rank has written.

        Returns:
            On rank 0 what the index needs; None on the others.
        """
        for finalize in self._request.finalize_fns:
            finalize()
        return self._strategy.written
