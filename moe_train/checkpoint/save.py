"""Write a checkpoint: stage, describe, commit by rename."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from moe_train.checkpoint import folders, manifest, optimizer_state, rng
from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.model_state import sharded_model_state
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
        CheckpointError: on every rank, when any rank could not write; the previous checkpoint
            is untouched.
    """
    rank = dist.get_rank()
    final = root / folders.committed_name(step)
    staging = root / f"{final.name}.tmp"
    _together(lambda: folders.staging_folder(root, step) if rank == 0 else None, staging)
    state, rng_sizes = _state(chunks, optimizer)
    # Megatron's writer threads answer through a Manager, which only asynchronous saving needs:
    # a spawned copy of the program per rank (340 MB), that outlives a rank which is killed.
    filesystem_async._results_queue = queue.Queue()
    _together(lambda: dist_checkpointing.save(state, str(staging)), staging)
    table = _together(lambda: _describe(staging, rank), staging)
    described = Manifest(
        step=step,
        optimizer_step=optimizer_state.optimizer_step(optimizer),
        optimizer_states=optimizer_state.state_names(optimizer),
        rng_sizes=rng_sizes,
        files=manifest.merged(table),
        **facts,
    )

    def publish() -> None:
        if rank == 0:
            described.write(staging)
            folders.commit(staging)
            folders.purge(root, keep)

    _together(publish, staging)
    return final


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
    """Flush and hash the files that this rank answers for: its own, and rank 0 the rest."""
    mine = {}
    for path in sorted(staging.iterdir()):
        owner = path.name.split("_")[2] if path.name.startswith("__") else "0"
        if owner == str(rank):
            folders.sync_file(path)
            mine[path.name] = manifest.file_facts(path)
    return mine


def _together(work: Any, staging: Path) -> list[Any]:
    """Run ``work`` on every rank; if it failed anywhere, raise the same error everywhere.

    torch's writers raise RuntimeError and CheckpointException, not only OSError, on a full
    disk.
    """
    result, problem = None, None
    try:
        result = work()
    except (OSError, RuntimeError, dist_checkpointing.core.CheckpointingException) as error:
        problem = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (problem, result))
    problems = [outcome[0] for outcome in outcomes if outcome[0]]
    if problems:
        raise CheckpointError(
            str(staging),
            f"could not be written: {problems[0]}",
            "free disk space or fix the folder; the previous checkpoint is untouched",
        )
    return [outcome[1] for outcome in outcomes]
