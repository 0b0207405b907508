"""Write a checkpoint: stage, describe, commit by rename."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.checkpoint import folders, manifest, optimizer_state, rng, space
from moe_train.checkpoint.index import write_index
from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.model_state import sharded_model_state
from moe_train.checkpoint.tensors import Written, check_complete, split, write_tensors
from moe_train.checkpoint.together import together
from moe_train.errors import CheckpointError


def save_checkpoint(
    root: Path,
    *,
    step: int,
    chunks: list[Any],
    optimizer: Any,
    facts: dict[str, Any],
    keep: int,
) -> Path:
    """Save model, optimizer, random states and data cursor; collective over the world.

    Args:
        root: ``checkpoints/`` of the run folder, shared by all ranks.
        facts: the manifest's fields that the caller knows (model, layout, cursor, ...).
        keep: committed checkpoints that stay.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: on every rank, when any rank could not write or the disk has no room;
            the previous checkpoint is untouched, and what was written of this one is removed.
    """
    rank = dist.get_rank()
    final = root / folders.committed_name(step)
    staging = root / f"{final.name}.tmp"
    state, rng_sizes = _state(chunks, optimizer)
    sharded = split(state)
    size = sum(_together(lambda: space.bytes_to_write(sharded), staging))
    # Megatron checks its own rule here (rank 0), so the outcome has to be shared as well.
    _together(lambda: check_complete(sharded), staging)

    def stage() -> None:
        if rank == 0:
            folders.staging_folder(root, step)
            space.check_free(root, size)

    def publish(written: Written | None, table: dict[str, dict[str, Any]]) -> None:
        if rank == 0:
            assert written is not None
            write_index(staging, *written)
            table[manifest.INDEX] = manifest.file_facts(staging / manifest.INDEX)
            Manifest(
                step=step,
                optimizer_step=optimizer_state.optimizer_step(optimizer),
                optimizer_states=optimizer_state.state_names(optimizer),
                rng_sizes=rng_sizes,
                files=table,
                **facts,
            ).write(staging)
            folders.commit(staging)

    try:
        _together(stage, staging)
        written: list[Written | None] = []
        _together(lambda: written.append(write_tensors(sharded, staging)), staging)
        tables = _together(lambda: _describe(staging, rank), staging)
        _together(lambda: publish(written[0], manifest.merged(tables)), staging)
    except CheckpointError:
        if rank == 0:
            # Its room may be what the next attempt needs.
            shutil.rmtree(staging, ignore_errors=True)
        raise
    together(lambda: _retire(final, keep) if rank == 0 else None, final, "is not sound", READ)
    return final


READ = "look at the disk: moe-train checkpoint list RUN shows what is sound"


def _retire(final: Path, keep: int) -> None:
    """Delete old checkpoints, once the new one is seen to be there as its manifest says.

    Its bytes were hashed as they lay when it was staged: here its names and sizes are compared.
    """
    manifest.verify(final, deep=False)
    folders.purge(final, keep)


def _state(chunks: list[Any], optimizer: Any) -> tuple[dict[str, Any], list[int]]:
    state = sharded_model_state(chunks)
    optimizer_state.initialise_state(optimizer)
    state["optimizer"] = {
        name: optimizer_state.sharded_state(optimizer, state, name, empty=False)
        for name in optimizer_state.state_names(optimizer)
    }
    packed, sizes = rng.pack()
    state["rng"] = rng.sharded(packed, dist.get_rank(), dist.get_world_size())
    return state, sizes


def _describe(staging: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Flush and hash this rank's own files."""
    mine = {}
    for path in sorted(staging.glob(f"__{rank}_*.distcp")):
        folders.sync_file(path)
        mine[path.name] = manifest.file_facts(path)
    return mine


def _together[T](work: Callable[[], T], staging: Path) -> list[T]:
    return together(
        work,
        staging,
        "could not be written",
        "free disk space or fix the folder; the previous checkpoint is untouched",
    )
