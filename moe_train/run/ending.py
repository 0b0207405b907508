"""How a run ends on this rank: what is said, by whom, and with which exit code."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from moe_train.errors import EXIT_HUNG, EXIT_MEMORY, EXIT_PREEMPTED, MoeTrainError
from moe_train.run.first_failure import claim, claimed
from moe_train.run.memory import explained
from moe_train.run.torchelastic import leave
from moe_train.run_folder.folder import RunFolder
from moe_train.run_folder.status import State, read_status, write_status

if TYPE_CHECKING:
    from moe_train.config.root import Config
    from moe_train.parallel.layout import Layout
    from moe_train.run.state import Standing

STOPPED = "stopped"
"""File in the logs of a run that was told to stop under the torchrun that is still there."""


def diagnosed(
    failure: BaseException, standing: Standing, config: Config, layout: Layout
) -> MoeTrainError | None:
    """The error of ours that ``failure`` comes to; None for one that only a traceback explains.

    To be called before the world is closed: its end is what the peers notice, and a failure of
    this rank has to be on record by then, or they would tell of a lost peer.
    """
    from moe_train.backend.groups import lost_peer
    from moe_train.backend.memory import memory_fault

    memory = memory_fault(failure)
    if memory is not None:
        memory = explained(memory, config, layout)
        if claim(standing.logs, str(memory)):
            _mark(standing, str(memory))
        return memory
    if isinstance(failure, MoeTrainError):
        return failure
    lost = lost_peer(failure)
    if lost is None:
        claim(standing.logs, f"{type(failure).__name__}: {failure}")
    return lost


def _mark(standing: Standing, reason: str) -> None:
    """Write the end into the status of a run under way, from whichever rank this is.

    Rank 0 does so when it notices, but on a GPU it may be waiting in a collective for good.
    """
    if standing.logs is None:
        return
    path = RunFolder(standing.logs.parent).status
    status = read_status(path)
    if status is not None and status.state == "running":
        write_status(path, "failed", standing.step, reason)


def end(fault: MoeTrainError, standing: Standing) -> int:
    """Tell how the run ends, in its folder and on stderr; returns the exit code."""
    state: State = "preempted" if fault.exit_code == EXIT_PREEMPTED else "failed"
    cause = claimed(standing.logs) if fault.exit_code == EXIT_HUNG else None
    tell_status(standing, state, cause or str(fault))
    return report(fault, standing)


def tell_status(standing: Standing, state: State, reason: str) -> None:
    """Write the end of this run into its folder, once the folder is this run's (rank 0)."""
    if standing.folder is not None and standing.taken_up:
        write_status(standing.folder.status, state, standing.step, reason)
        if state == "preempted":
            (standing.folder.logs / STOPPED).touch()


def report(fault: MoeTrainError, standing: Standing | None = None) -> int:
    """Tell an error once, from rank 0, and return its exit code.

    A lost peer may be rank 0 itself, and memory may run out on any rank: these are told by the
    first rank that has something to say.
    """
    logs = standing.logs if standing else None
    first = os.environ.get("RANK", "0") == "0"
    cause = None
    if fault.exit_code in (EXIT_HUNG, EXIT_MEMORY):
        cause = claimed(logs)
        first = claim(logs, str(fault))
    leave(f"ended with another rank, which said: {cause}" if cause else str(fault))
    if first:
        print(f"moe_train: {fault}", file=sys.stderr, flush=True)
    return fault.exit_code
