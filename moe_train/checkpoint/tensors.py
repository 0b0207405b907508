"""A rank's entries to files in a folder, planned by Megatron, without any pickled index.

Megatron's own ``dist_checkpointing.save`` adds an index and a common state that are pickles. Its
planner decides here what goes where; its writer, which would bring everything to the host before
the first byte is written, is not used: values are fetched one item at a time as the file reaches
them. The bytes are those of its writer.
"""

from __future__ import annotations

import os
import queue
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import is_main_replica
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

from moe_train.checkpoint.digests import HashingStream, block_size
from moe_train.checkpoint.entries import Entry, Tree, listed, stand_ins
from moe_train.checkpoint.slices import Slice, Stream
from moe_train.checkpoint.staging import Staging

type Written = tuple[Metadata, list[list[WriteResult]]]


class _Saving(TorchDistSaveShardedStrategy):
    """Keeps what torch would pickle into ``.metadata``, on the coordinating rank."""

    written: Written | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        def keep(metadata: Metadata, results: list[list[WriteResult]]) -> None:
            self.written = metadata, results

        writer.finish = keep
        return super()._get_save_and_finalize_callbacks(writer, *args)


def split(tree: Tree) -> dict[str, Any]:
    """The sharded tensors of ``tree``, its factories applied, on stand-ins without memory."""
    sharded, common = save_preprocess(stand_ins(tree), False)
    assert not common, f"not tensors: {sorted(common)}"
    return dict(sharded)


def check_complete(sharded: dict[str, Any]) -> None:
    """Check that the ranks together have every part of every tensor once; collective.

    Raises:
        CheckpointingException: Megatron's, on the rank that checks (0).
    """
    validate_sharding_integrity(determine_global_metadata(sharded)[1])


class Values:
    """The values of this rank's items on the host, one after the other, in the order of the file.

    Args:
        tree: every rank of a data-parallel group has the same slices in it, in the same order, and
            their spans are known.

    Raises:
        torch.OutOfMemoryError: the device has no room for a piece.
    """

    def __init__(self, tree: Tree) -> None:
        self._staging = Staging()
        self._places: dict[tuple[str, tuple[int, ...]], tuple[Entry, int]] = {}
        by_key: dict[str, list[Slice]] = {}
        for entry in listed(tree):
            items = entry.items(entry.stand_in())
            for number, item in enumerate(items):
                if is_main_replica(item.replica_id):
                    self._places[item.key, tuple(item.global_offset)] = entry, number
            if isinstance(entry, Slice):
                # Megatron writes all parts of a global tensor before the next one's.
                by_key.setdefault(items[0].key, []).append(entry)
        slices = [entry for entries in by_key.values() for entry in entries]
        self._stream = Stream(slices, self._staging)

    def of(self, item: WriteItem, *, copy: bool = False) -> torch.Tensor:
        """Contiguous values of an item, in a storage of their own.

        Args:
            copy: never the state itself, which may change before they are written.
        """
        assert item.index.offset is not None
        entry, number = self._places[item.index.fqn, tuple(item.index.offset)]
        whole = self._stream.whole(entry) if isinstance(entry, Slice) else entry.live
        part = entry.items(whole)[number].data
        assert part is not None
        return self._staging.to_host(part, entry.dtype, copy=copy)

    def finish(self) -> None:
        """Let peers have what this rank does not ask for; on every rank, whatever went wrong."""
        self._stream.drain()


class Writing:
    """This rank's entries on their way into ``folder``.

    Opening and :meth:`finish` are collective over the world. :meth:`take`, or :meth:`run` without
    it, is collective over data-parallel groups whose optimizers hold slices: every rank has to come
    there. After :meth:`take`, :meth:`run` may go on in a thread beside other collectives.

    Args:
        sharded: :func:`split`'s result for the tree that ``values`` are of.
        files: that the checkpoint will have, about.
    """

    def __init__(
        self, values: Values, sharded: dict[str, Any], folder: Path, *, files: int
    ) -> None:
        self.facts: dict[str, dict[str, Any]] = {}
        """What the manifest says of this rank's files, once they are written."""
        self._values, self._expected = values, files
        self._taken: dict[int, torch.Tensor] = {}
        # Megatron's writer threads answer through a Manager, which only its own asynchronous
        # saving needs: a spawned copy of the program per rank (340 MB), that outlives a rank
        # which is killed.
        self._results: queue.Queue[Any] = queue.Queue()
        filesystem_async._results_queue = self._results
        self._strategy = _Saving()
        self._request = self._strategy.async_save(sharded, folder, async_strategy="mcore")
        arguments = list(self._request.async_fn_args)
        # Buckets: path, name of the file, (objects, tensors); one for each file.
        self._buckets: list[Any] = arguments[1] if arguments else []
        assert not any(objects for _, _, (objects, _) in self._buckets), "not tensors"

    def take(self) -> None:
        """Copy the values to the host, so that the state may change while they are written.

        Needs room in host memory for this rank's part of a checkpoint.

        Raises:
            torch.OutOfMemoryError: the device has no room for a piece.
        """
        try:
            for _, _, (_, tensors) in self._buckets:
                for item, _ in tensors:
                    self._taken[id(item)] = self._values.of(item, copy=True)
        finally:
            self._values.finish()

    def run(self) -> None:
        """Write, hash and flush this rank's files.

        Raises:
            OSError: the disk refuses.
            torch.OutOfMemoryError: the device has no room for a piece.
        """
        written = {}
        try:
            for number, (path, name, (_, tensors)) in enumerate(self._buckets):
                written[number] = self._write(path, name, tensors)
        finally:
            self._values.finish()
        if self._buckets:
            self._results.put(written)

    def _write(self, path: str, name: str, tensors: list[Any]) -> list[WriteResult]:
        size = sum(stand_in.numel() * stand_in.itemsize for _, stand_in in tensors)
        results = []
        with open(path, "wb") as plain:
            stream = HashingStream(plain, block_size(size, self._expected))
            for item, stand_in in tensors:
                values = self._taken.pop(id(item), None)
                if values is None:
                    values = self._values.of(item)
                results.append(
                    _write_item(
                        _StorageWriterTransforms(),
                        stream,  # type: ignore[arg-type]
                        values.view(stand_in.shape),
                        item,
                        name,
                        SerializationFormat.TORCH_SAVE,
                    )
                )
            plain.flush()
            os.fsync(plain.fileno())
        self.facts[name] = stream.facts()
        return results

    def finish(self) -> Written | None:
        """Gather what was written where, once every rank has run.

        Returns:
            On rank 0 what the index needs; None on the others.
        """
        for finalize in self._request.finalize_fns:
            finalize()
        return self._strategy.written
