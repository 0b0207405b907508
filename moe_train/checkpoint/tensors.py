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


def write_tensors(sharded: dict[str, Any], folder: Path) -> Written | None:
    """Write this rank's part of :func:`split`'s result into ``folder``; collective.

    Returns:
        On rank 0 what the index needs; None on the others.

    Raises:
        CheckpointException: torch's, a BaseException, on every rank, when one could not write.
    """
    # Megatron's writer threads answer through a Manager, which only asynchronous saving needs:
    # a spawned copy of the program per rank (340 MB), that outlives a rank which is killed.
    filesystem_async._results_queue = queue.Queue()
    strategy = _Saving()
    strategy.save(sharded, str(folder))
    return strategy.written


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
