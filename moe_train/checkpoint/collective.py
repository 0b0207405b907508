"""Runs a piece of work on all ranks; a failure on any of them is the same error on all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from moe_train.backend.memory import memory_fault
from moe_train.errors import CheckpointError, MoeTrainError

LOGGER = logging.getLogger(__name__)


def run_on_all_ranks[T](work: Callable[[], T], folder: Path, failure: str, fix: str) -> list[T]:
    """Run ``work`` on every rank; if it failed anywhere, raise the same error everywhere.

    Without this a rank that failed would leave its peers waiting in their next collective.

    Args:
        folder: the checkpoint that is worked on, for the message.
        failure: what a failure means, such as ``could not be written``.

    Returns:
        The ranks' results, by rank; they travel between ranks, so they should be small.

    Raises:
        CheckpointError: with the first failed rank's reason.
        MemoryFault: the same, where that reason is memory.
    """
    error: MoeTrainError | None = None
    cause: BaseException | None = None
    result: T | None = None
    try:
        result = work()
    # A full disk is an OSError, a RuntimeError or torch's CheckpointException, depending on who
    # wrote; a damaged item is whatever unpacking it makes of it. All of it must reach the peers.
    except (Exception, CheckpointException) as problem:
        cause = problem
        unexpected = not isinstance(problem, CheckpointError)
        # In this rank's file alone: what is raised below is reported by whoever catches it.
        LOGGER.warning(
            "%s %s: %s", folder, failure, problem, exc_info=unexpected, extra={"console": False}
        )
        if isinstance(problem, CheckpointError) and problem.field.startswith(str(folder)):
            # It names the checkpoint or a file of it already, and what to do.
            error = problem
        else:
            error = memory_fault(problem, f"{folder.name} {failure}") or CheckpointError(
                str(folder), f"{failure} ({_reason(problem)})", fix
            )
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (error, cause is error, result))
    for rank, (first, names_folder, _) in enumerate(outcomes):
        if first is not None:
            if names_folder and any(str(other) != str(first) for other, *_ in outcomes):
                problem_here = f"{first.problem} (seen by rank {rank})"
                first = CheckpointError(first.field, problem_here, first.fix)
            raise first from cause
    return [result for *_, result in outcomes]


def _reason(error: BaseException) -> str:
    """Rank and reason; torch's exception of many ranks is one long text of tracebacks."""
    rank = dist.get_rank()
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = min(error.failures.items())
        error = inner
    if isinstance(error, CheckpointError):
        return f"rank {rank}: {error.field}: {error.problem}"
    return f"rank {rank}: {type(error).__name__}: {error}"
