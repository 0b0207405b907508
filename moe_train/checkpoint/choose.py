"""Which checkpoint to start from: every rank verifies its own share, all go by one verdict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.backend.memory import memory_fault
from moe_train.checkpoint import folders
from moe_train.checkpoint.digests import blocks, share
from moe_train.checkpoint.manifest import NAME, Manifest, check_blocks, check_files, read_manifest
from moe_train.errors import CheckpointError, MoeTrainError


def find_checkpoint(root: Path, resume: str) -> tuple[Path | None, list[str]]:
    """Choose what to resume from; collective over the world, the same answer on every rank.

    The newest checkpoint is looked at first, by all ranks together; damage that one of them sees
    sends all of them on to the next older one.

    Args:
        resume: ``auto`` (newest that verifies, under ``root``), ``never``, or a path; rank 0's
            view of the folders counts.

    Returns:
        The folder or None, and a warning for each newer checkpoint that was passed over.

    Raises:
        CheckpointError: the named path is not a sound checkpoint, or every one is damaged.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        # A link that a user names is the user's; those inside are refused.
        folder = _agreed(root, lambda: Path(resume).resolve())[0]
        verify_together(folder)
        return folder, []
    warnings: list[str] = []
    candidates = _agreed(root, lambda: folders.committed(root) if dist.get_rank() == 0 else [])[0]
    for folder in candidates:
        try:
            verify_together(folder)
        except CheckpointError as damage:
            warnings.append(str(damage))
            continue
        return folder, warnings
    if candidates:
        raise CheckpointError(
            str(root),
            f"all {len(candidates)} checkpoints are damaged: {warnings[0]}",
            "restore one of them, or start again with checkpoint.resume=never",
        )
    return None, warnings


def verify_together(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest, each rank an even share; collective.

    Rank 0 compares names and sizes. Nothing that differs by rank decides anything alone: what any
    rank finds wrong, or cannot read, is raised on all of them.

    Raises:
        CheckpointError: the first rank's reason, the same on every rank.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    manifests: list[Manifest] = []

    def look() -> str:
        manifests.append(read_manifest(folder))
        if rank == 0:
            check_files(folder, manifests[0])
        return hashlib.sha256(json.dumps(asdict(manifests[0])).encode()).hexdigest()

    seen = _agreed(folder, look)
    # Shares are cut from the manifest: from different ones they would not make up a whole.
    for other, digest in enumerate(seen):
        if digest != seen[0]:
            raise CheckpointError(
                str(folder / NAME),
                f"reads differently on rank {other} and on rank 0",
                "the ranks must share one file system; one that lags may have caught up by now",
            )
    manifest = manifests[0]
    _agreed(folder, lambda: check_blocks(folder, share(blocks(manifest.files), rank, world)))
    return manifest


def _agreed[T](folder: Path, work: Callable[[], T]) -> list[T]:
    """All ranks' results, unless one of them failed: then its error, on all; collective."""
    fault: MoeTrainError | None = None
    result: T | None = None
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        result = work()
    except CheckpointError as damage:
        fault = damage
    # Whatever else ends this rank's part must not leave its peers waiting.
    except (OSError, RuntimeError, MemoryError, ValueError) as problem:
        fault = memory_fault(problem, f"{folder.name} cannot be read") or CheckpointError(
            str(folder),
            f"cannot be read: {type(problem).__name__}: {problem}",
            "look at the disk: moe-train checkpoint list RUN shows what is sound",
        )
        fault.__cause__ = problem
    if isinstance(fault, CheckpointError) and world > 1:
        cause = fault.__cause__
        fault = CheckpointError(fault.field, f"{fault.problem} (seen by rank {rank})", fault.fix)
        fault.__cause__ = cause
    outcomes: list[Any] = [None] * world
    dist.all_gather_object(outcomes, (fault, result))
    for number, (other, _) in enumerate(outcomes):
        if other is not None:
            raise fault if fault is not None and number == rank else other
    return [value for _, value in outcomes]
