"""Saves a checkpoint: stage, write, describe, commit by rename; at once, or asynchronously."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.checkpoint import folders, manifest, optimizer_state
from moe_train.checkpoint.collective import run_on_all_ranks
from moe_train.checkpoint.digests import FileEntry, file_entry
from moe_train.checkpoint.index import write_index
from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.shards import StateDict, flat_shards, gather_ranges
from moe_train.checkpoint.state_dict import checkpoint_state
from moe_train.checkpoint.write import (
    ItemValues,
    ShardWriter,
    Written,
    bytes_to_write,
    check_sharding,
    plan_sharded,
)
from moe_train.errors import MoeTrainError

_FREE_SPACE = "free disk space or fix the folder; the previous checkpoint is untouched"
_LIST = "look at the disk: moe-train checkpoint list RUN shows what is sound"


class Save:
    """A save of model, optimizer, random states and data cursor that has begun.

    Opening and :meth:`commit` are collective over the world; between them every rank's files are
    written without any collective. Until :meth:`commit` returns, no checkpoint of this step
    exists: an earlier one stays the newest.

    Args:
        root: ``checkpoints/`` of the run folder, shared by all ranks.
        fields: the manifest's fields that the caller knows (model, layout, cursor, ...).
        keep: committed checkpoints that stay.
        asynchronous: write in a thread, from a copy of the state; the caller may go on training.

    Raises:
        CheckpointError: on every rank, when any rank could not write or the disk is too full;
            the previous checkpoint is untouched, and what was written of this one is removed.
    """

    def __init__(
        self,
        root: Path,
        *,
        step: int,
        chunks: list[Any],
        optimizer: Any,
        fields: dict[str, Any],
        keep: int,
        asynchronous: bool = False,
    ) -> None:
        begun = time.monotonic()
        self._root, self._step, self._keep = root, step, keep
        self.final = root / folders.committed_name(step)
        self._staging = root / f"{self.final.name}.tmp"
        state = self._describe(chunks, optimizer, fields)
        # Work that may fail on one rank alone comes before collectives.
        values = self._own(lambda: ItemValues(state))
        sharded = self._own(lambda: plan_sharded(state))
        size = sum(self._on_all_ranks(lambda: bytes_to_write(sharded)))
        # Megatron checks its own rule here (rank 0), so the outcome has to be shared as well.
        self._on_all_ranks(lambda: check_sharding(sharded))
        self._on_all_ranks(lambda: self._make_staging(size))
        self._writer: ShardWriter | None = self._own(
            lambda: ShardWriter(values, sharded, self._staging, files=dist.get_world_size())
        )
        self._pending: Future[dict[str, FileEntry]] | None = None
        if asynchronous:
            self._on_all_ranks(self._writer.stage)
        self.seconds = time.monotonic() - begun
        """Time spent on the save so far, in either thread."""
        if asynchronous:
            pool = ThreadPoolExecutor(1, "checkpoint")
            self._pending = pool.submit(self._write)
            pool.shutdown(wait=False)
        else:
            # Here, not in a thread: values come from the device that this one has chosen.
            self._entries = self._on_all_ranks(self._write)

    def _describe(self, chunks: list[Any], optimizer: Any, fields: dict[str, Any]) -> StateDict:
        """The state to save; completes the manifest's fields."""

        def describe() -> StateDict:
            optimizer_state.initialise_state(optimizer)
            state, rng_sizes = checkpoint_state(chunks, optimizer)
            self._fields = fields | {
                "step": self._step,
                "optimizer_step": optimizer_state.optimizer_step(optimizer),
                "optimizer_states": optimizer_state.state_names(optimizer),
                "rng_sizes": rng_sizes,
            }
            return state

        state = self._own(describe)
        self._on_all_ranks(lambda: gather_ranges(flat_shards(state)))
        return state

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write, so that it need not wait in commit."""
        return self._pending is None or self._pending.done()

    def commit(self) -> Path:
        """Wait for the files and give the checkpoint its name; collective.

        Returns:
            The committed folder.
        """
        begun = time.monotonic()
        if self._pending is not None:
            self._entries = self._on_all_ranks(self._pending.result)
        assert self._writer is not None
        written = self._own(self._writer.finish)
        self._writer = None
        self._on_all_ranks(lambda: self._publish(written))
        run_on_all_ranks(self._prune, self.final, "failed verification", _LIST)
        self.seconds += time.monotonic() - begun
        return self.final

    def _make_staging(self, size: int) -> None:
        if dist.get_rank() == 0:
            folders.staging_folder(self._root, self._step)
            folders.check_free_space(self._root, size)

    def _write(self) -> dict[str, FileEntry]:
        """Write, hash and flush this rank's own files; their entries in the manifest."""
        begun = time.monotonic()
        assert self._writer is not None
        self._writer.write()
        self.seconds += time.monotonic() - begun
        return self._writer.entries

    def _publish(self, written: Written | None) -> None:
        if dist.get_rank() == 0:
            assert written is not None
            write_index(self._staging, *written)
            files = {manifest.INDEX: file_entry(self._staging / manifest.INDEX)}
            for entries in self._entries:
                files |= entries
            Manifest(files=files, **self._fields).write(self._staging)
            folders.commit(self._staging)

    def _prune(self) -> None:
        """Delete old checkpoints, once the new one is seen to be there as its manifest says.

        Its bytes were hashed on their way to the disk: here its names and sizes are compared.
        """
        if dist.get_rank() == 0:
            manifest.verify(self.final, deep=False)
            folders.quarantine_later(self.final)
            folders.prune(self.final, self._keep)

    def _own[T](self, work: Callable[[], T]) -> T:
        """This rank's result, which is not sent to others; a failure is raised on all ranks."""
        results: list[T] = []
        self._on_all_ranks(lambda: results.append(work()))
        return results[0]

    def _on_all_ranks[T](self, work: Callable[[], T]) -> list[T]:
        try:
            return run_on_all_ranks(work, self._staging, "could not be written", _FREE_SPACE)
        except MoeTrainError:
            if dist.get_rank() == 0:
                # The next attempt may need its space.
                shutil.rmtree(self._staging, ignore_errors=True)
            raise
