"""One outcome for all ranks of a piece of work that may fail on some of them."""

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


def together[T](work: Callable[[], T], folder: Path, failure: str, fix: str) -> list[T]:
    """Run ``work`` on every rank; if it failed anywhere, raise the same error everywhere.

    Without this a rank that failed would leave its peers waiting in their next collective.

    Args:
        folder: what is worked on, for the message.
        failure: what a failure means, such as ``could not be written``.

    Returns:
        The ranks' results, by rank; they travel between ranks, so they should be small.

    Raises:
        CheckpointError: with the first rank's reason.
        MemoryFault: the same, where that reason is memory.
    """
    fault: MoeTrainError | None = None
    cause: BaseException | None = None
    result: T | None = None
    try:
        result = work()
    # A full disk is an OSError, a RuntimeError or torch's CheckpointException, depending on who
    # wrote; a damaged item is whatever unpacking it makes of it. All of it must reach the peers.
    except (Exception, CheckpointException) as error:
        LOGGER.warning("%s %s", folder, failure, exc_info=True)
        fault, cause = memory_fault(error, f"{folder.name} {failure}"), error
        if fault is None:
            fault = CheckpointError(str(folder), f"{failure} ({_told(error)})", fix)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (fault, result))
    for other, _ in outcomes:
        if other is not None:
            raise other from cause
    return [outcome for _, outcome in outcomes]


def _told(error: BaseException) -> str:
    """Rank and reason; torch's exception of many ranks is one long text of tracebacks."""
    rank = dist.get_rank()
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = min(error.failures.items())
        error = inner
    if isinstance(error, CheckpointError):
        return f"rank {rank}: {error.field}: {error.problem}"
    return f"rank {rank}: {type(error).__name__}: {error}"
