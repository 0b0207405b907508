"""Write a checkpoint: stage, write, describe, commit by rename; all at once, or beside training."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.checkpoint import folders, manifest, optimizer_state, rng, space
from moe_train.checkpoint.digests import file_facts
from moe_train.checkpoint.entries import Tree
from moe_train.checkpoint.index import write_index
from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.model_state import model_entries, sharded_model_state
from moe_train.checkpoint.slices import exchange_spans, slices_of
from moe_train.checkpoint.tensors import Values, Writing, Written, check_complete, split
from moe_train.checkpoint.together import together
from moe_train.errors import MoeTrainError

type Table = dict[str, dict[str, Any]]
"""Entries of files in a manifest."""


class Save:
    """One checkpoint of model, optimizer, random states and data cursor, on its way to the disk.

    Opening and :meth:`commit` are collective over the world; between them every rank's files are
    written without any collective. Until :meth:`commit` returns, no checkpoint of this step
    exists: an earlier one stays the newest.

    Args:
        root: ``checkpoints/`` of the run folder, shared by all ranks.
        facts: the manifest's fields that the caller knows (model, layout, cursor, ...).
        keep: committed checkpoints that stay.
        beside: write in a thread, from a copy of the state; the caller may go on training.

    Raises:
        CheckpointError: on every rank, when any rank could not write or the disk has no room;
            the previous checkpoint is untouched, and what was written of this one is removed.
    """

    def __init__(
        self,
        root: Path,
        *,
        step: int,
        chunks: list[Any],
        optimizer: Any,
        facts: dict[str, Any],
        keep: int,
        beside: bool = False,
    ) -> None:
        begun = time.monotonic()
        self._root, self._step, self._keep = root, step, keep
        self.final = root / folders.committed_name(step)
        self._staging = root / f"{self.final.name}.tmp"
        tree = self._describe(chunks, optimizer, facts)
        # All that may fail on one rank alone comes before what the ranks do together.
        values = self._shared(lambda: Values(tree))
        sharded = self._shared(lambda: split(tree))
        size = sum(self._together(lambda: space.bytes_to_write(sharded)))
        # Megatron checks its own rule here (rank 0), so the outcome has to be shared as well.
        self._together(lambda: check_complete(sharded))
        self._together(lambda: self._stage(size))
        files = dist.get_world_size()
        self._writing: list[Writing] = [
            self._shared(lambda: Writing(values, sharded, self._staging, files=files))
        ]
        self._tables: list[Table] | None = None
        if beside:
            self._together(self._writing[0].take)
        self.seconds = time.monotonic() - begun
        """What the save has cost so far, whoever waited for it."""
        if beside:
            pool = ThreadPoolExecutor(1, "checkpoint")
            self._table = pool.submit(self._write)
            pool.shutdown(wait=False)
        else:
            # Here, not in a thread: values come from the device that this one has chosen.
            self._tables = self._together(self._write)

    def _describe(self, chunks: list[Any], optimizer: Any, facts: dict[str, Any]) -> Tree:
        """The entries to save, and the manifest's fields."""

        def describe() -> Tree:
            optimizer_state.initialise_state(optimizer)
            tree, rng_sizes = _state(chunks, optimizer)
            self._facts = facts | {
                "step": self._step,
                "optimizer_step": optimizer_state.optimizer_step(optimizer),
                "optimizer_states": optimizer_state.state_names(optimizer),
                "rng_sizes": rng_sizes,
            }
            return tree

        tree = self._shared(describe)
        self._together(lambda: exchange_spans(slices_of(tree)))
        return tree

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write, so that it need not wait in commit."""
        return self._tables is not None or self._table.done()

    def commit(self) -> Path:
        """Wait for the files and give the checkpoint its name; collective.

        Returns:
            The committed folder.
        """
        begun = time.monotonic()
        tables = self._tables or self._together(self._table.result)
        found: list[Written | None] = []
        self._together(lambda: found.append(self._writing.pop().finish()))
        self._together(lambda: self._publish(found[0], manifest.merged(tables)))
        together(lambda: _retire(self.final, self._keep), self.final, "is not sound", READ)
        self.seconds += time.monotonic() - begun
        return self.final

    def _stage(self, size: int) -> None:
        if dist.get_rank() == 0:
            folders.staging_folder(self._root, self._step)
            space.check_free(self._root, size)

    def _write(self) -> Table:
        """Write, hash and flush this rank's own files."""
        begun = time.monotonic()
        writing = self._writing[0]
        writing.run()
        self.seconds += time.monotonic() - begun
        return writing.facts

    def _publish(self, written: Written | None, table: Table) -> None:
        if dist.get_rank() == 0:
            assert written is not None
            write_index(self._staging, *written)
            table[manifest.INDEX] = file_facts(self._staging / manifest.INDEX)
            Manifest(files=table, **self._facts).write(self._staging)
            folders.commit(self._staging)

    def _shared[T](self, work: Callable[[], T]) -> T:
        """This rank's result of a work whose failure all ranks hear of."""
        own: list[T] = []
        self._together(lambda: own.append(work()))
        return own[0]

    def _together[T](self, work: Callable[[], T]) -> list[T]:
        try:
            return together(work, self._staging, "could not be written", FREE)
        except MoeTrainError:
            if dist.get_rank() == 0:
                # Its room may be what the next attempt needs.
                shutil.rmtree(self._staging, ignore_errors=True)
            raise


READ = "look at the disk: moe-train checkpoint list RUN shows what is sound"
FREE = "free disk space or fix the folder; the previous checkpoint is untouched"


def _retire(final: Path, keep: int) -> None:
    """Delete old checkpoints, once the new one is seen to be there as its manifest says.

    Its bytes were hashed on their way to the disk: here its names and sizes are compared.
    """
    if dist.get_rank() == 0:
        manifest.verify(final, deep=False)
        folders.purge(final, keep)


def _state(chunks: list[Any], optimizer: Any) -> tuple[Tree, list[int]]:
    model_state = sharded_model_state(chunks)
    tree = model_entries(chunks, model_state)
    tree["optimizer"] = {
        name: optimizer_state.state_entries(optimizer, model_state, name)
        for name in optimizer_state.state_names(optimizer)
    }
    packed, sizes = rng.pack()
    tree["rng"] = rng.entry(packed, dist.get_rank(), dist.get_world_size())
    return tree, sizes
