"""Sharded tensors to and from a folder, by Megatron's planners, without any pickled index.

Megatron's own ``dist_checkpointing.save`` and ``load`` add an index and a common state that are
pickles, and read both before anything else. What they do besides is done here. Items inside the
``.distcp`` files are read by ``torch.load(weights_only=True)``, which builds tensors only.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.dist_checkpointing.validation import (
    determine_global_metadata,
    validate_sharding_integrity,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from moe_train.checkpoint.index import read_index
from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.together import together

type Written = tuple[Metadata, list[list[WriteResult]]]


class _Saving(TorchDistSaveShardedStrategy):
    """Keeps what torch would pickle into ``.metadata``, on the coordinating rank."""

    written: Written | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        def keep(metadata: Metadata, results: list[list[WriteResult]]) -> None:
            self.written = metadata, results

        writer.finish = keep
        return super()._get_save_and_finalize_callbacks(writer, *args)


def split(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with its factories applied, ready to be written; changes ``state``."""
    sharded, common = save_preprocess(state, False)
    assert not common, f"not tensors: {sorted(common)}"
    return dict(sharded)


def check_complete(sharded: dict[str, Any]) -> None:
    """Check that the ranks together have every part of every tensor once; collective.

    Raises:
        CheckpointingException: Megatron's, on the rank that checks (0).
    """
    validate_sharding_integrity(determine_global_metadata(sharded)[1])


class Writing:
    """This rank's part of :func:`split`'s result on its way into ``folder``.

    Opening and :meth:`finish` are collective; :meth:`run` is not, and may run in a thread while
    other collectives go on.

    Args:
        copy: take the values now, so that the state may change while they are written; needs room
            in host memory for this rank's part of a checkpoint.

    Raises:
        CheckpointException: torch's, a BaseException, on every rank, when one could not write.
    """

    def __init__(self, sharded: dict[str, Any], folder: Path, *, copy: bool) -> None:
        # Megatron's writer threads answer through a Manager, which only its own asynchronous
        # saving needs: a spawned copy of the program per rank (340 MB), that outlives a rank
        # which is killed.
        filesystem_async._results_queue = queue.Queue()
        self._strategy = _Saving()
        self._request = self._strategy.async_save(sharded, folder, async_strategy="mcore")
        self._arguments = list(self._request.async_fn_args)
        if self._arguments:
            rank, buckets, results = self._arguments
            self._arguments = [rank, [_on_host(bucket, copy) for bucket in buckets], results]

    def run(self) -> None:
        """Write this rank's files; what goes wrong is told by :meth:`finish`."""
        if self._request.async_fn is not None:
            self._request.async_fn(*self._arguments, **self._request.async_fn_kwargs)
        self._arguments = []

    def finish(self) -> Written | None:
        """Gather what was written where, once every rank has run.

        Returns:
            On rank 0 what the index needs; None on the others.
        """
        for finalize in self._request.finalize_fns:
            finalize()
        return self._strategy.written


def _on_host(bucket: Any, copy: bool) -> Any:
    name, key, (objects, tensors) = bucket
    # Megatron's own staging leaves tensors where they are that lie on the host already.
    moved = [(item, tensor.to("cpu", copy=copy)) for item, tensor in tensors]
    return name, key, (objects, moved)


def read_tensors(state: dict[str, Any], folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The values of ``state``'s sharded tensors; collective, and one outcome for all ranks.

    Raises:
        CheckpointError: the index is malformed, a tensor is missing or has another shape, an
            item is no tensor.
    """
    sharded, _, factories = load_preprocess(state)

    def read() -> dict[str, Any]:
        with reader(folder, manifest):
            strategy = TorchDistLoadShardedStrategy(cache_metadata=True)
            return dict(strategy.load(sharded, str(folder)))

    together(lambda: check_complete(sharded), folder, "does not fit this model", OTHER)
    own: list[dict[str, Any]] = []
    together(lambda: own.append(read()), folder, "cannot be loaded", OTHER)
    merged: dict[str, Any] = apply_factory_merges(own[0], factories)
    return merged


OTHER = "resume from another checkpoint: checkpoint.resume=PATH"


@contextmanager
def reader(folder: Path, manifest: Manifest) -> Iterator[CachedMetadataFileSystemReader]:
    """Torch's reader for a checkpoint, with the checked JSON index for its metadata.

    Megatron makes such readers itself, by path: they share one cache, so that this one's
    metadata is theirs. Were it not, they would look for a pickle, and verified checkpoints have
    none.

    Raises:
        CheckpointError: the index is malformed.
    """
    cache, key = CachedMetadataFileSystemReader._metadata_cache, os.path.abspath(folder)
    cache[key] = read_index(folder, manifest)
    try:
        yield CachedMetadataFileSystemReader(str(folder))
    finally:
        del cache[key]
