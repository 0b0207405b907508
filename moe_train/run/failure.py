"""Failure of a run: one report for all ranks, the final status, the exit code of this rank."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from moe_train.errors import (
    EXIT_HUNG,
    EXIT_MEMORY,
    EXIT_PREEMPTED,
    DeviceMemoryError,
    HungError,
    MemoryFault,
    MoeTrainError,
)
from moe_train.parallel.resolved import ResolvedRun
from moe_train.planner.estimate import GB, estimate
from moe_train.run.logs import FILE_ONLY
from moe_train.run.state import RunState
from moe_train.run.torchelastic import write_error_file
from moe_train.run.watchdog import exit_after
from moe_train.run_folder.folder import RunFolder
from moe_train.run_folder.status import State, read_status, write_status

LOGGER = logging.getLogger(__name__)
FIRST_FAILURE = "cause"
"""File in the logs: the rank that failed first, and its error."""
STOPPED = "stopped"
"""File in the logs of a run that was preempted under a torchrun that may restart its ranks."""
LOG_SECONDS = 5.0
"""How long a hung rank may take to log why it ends."""
MORE_MEMORY = "more ranks, or devices with more memory"


def report_once(logs: Path | None, text: str) -> bool:
    """Whether this rank is the first to report a failure; ``text`` is then kept in ``logs``.

    Without a folder every rank reports. A rank that reported before is still the first.
    """
    if logs is None:
        return True
    path = logs / FIRST_FAILURE
    try:
        with open(path, "x", encoding="utf-8") as stream:
            stream.write(f"{_rank()}: {text}\n")
    except FileExistsError:
        return path.read_text(encoding="utf-8").startswith(f"{_rank()}: ")
    return True


def peer_failure(logs: Path | None) -> str | None:
    """The failure that another rank reported first; None where none did."""
    if logs is None:
        return None
    try:
        text = (logs / FIRST_FAILURE).read_text(encoding="utf-8").rstrip()
    except OSError:
        return None
    rank, _, failure = text.partition(": ")
    # The file is empty between its creation and the write.
    return failure if failure and rank != _rank() else None


def clear(logs: Path) -> None:
    """Delete the report of an earlier start of the run (rank 0, before its peers train)."""
    (logs / FIRST_FAILURE).unlink(missing_ok=True)


def _rank() -> str:
    return f"rank {os.environ.get('RANK', '0')}"


def diagnose(error: BaseException, state: RunState, run: ResolvedRun) -> MoeTrainError | None:
    """The error of our family that ``error`` amounts to; None for one that needs its traceback.

    Call it before the process groups are closed: peers notice the close, and would report a lost
    peer if this rank's failure were not on record by then.
    """
    from moe_train.backend.groups import lost_peer
    from moe_train.backend.memory import memory_fault

    memory = memory_fault(error)
    if memory is not None:
        memory = explain(memory, run)
        if report_once(state.logs, str(memory)):
            _mark_failed(state, str(memory))
        return memory
    if isinstance(error, MoeTrainError):
        return error
    lost = lost_peer(error)
    if lost is None:
        report_once(state.logs, f"{type(error).__name__}: {error}")
    return lost


def explain(error: MemoryFault, run: ResolvedRun) -> MemoryFault:
    """``error`` with the planned peak of its rank, and with overrides that need less.

    Host memory is not planned. A second call changes nothing.
    """
    name, _, number = error.field.partition(" ")
    if (
        not isinstance(error, DeviceMemoryError)
        or name != "rank"
        or "the plan has" in error.problem
    ):
        return error
    stage = run.layout.coordinates(int(number)).dense.pp
    plan = estimate(run)
    need = plan.memory[stage]
    fixes = [f"{overrides} (planned: {size / GB:.1f} GB)" for overrides, size in plan.lighter()]
    return DeviceMemoryError(
        error.field,
        f"{error.problem}; the plan has {need.total / GB:.1f} GB for stage {stage} at its peak "
        f"({need.peak.name}): {need.state.device / GB:.1f} GB weights, gradients and optimizer, "
        f"{need.activations / GB:.1f} GB activations, "
        f"{(need.fragmentation + need.reserved) / GB:.1f} GB spare",
        "\n      or ".join([*fixes, MORE_MEMORY]),
    )


def _mark_failed(state: RunState, reason: str) -> None:
    """Write the status of a running run from any rank: rank 0 may hang in a GPU collective."""
    if state.logs is None:
        return
    path = RunFolder(state.logs.parent).status
    status = read_status(path)
    if status is not None and status.state == "running":
        write_status(path, "failed", state.step, reason)


def end_run(error: MoeTrainError, state: RunState) -> int:
    """Write the final status and report ``error``; returns the exit code."""
    final: State = "preempted" if error.exit_code == EXIT_PREEMPTED else "failed"
    cause = peer_failure(state.logs) if error.exit_code == EXIT_HUNG else None
    write_final_status(state, final, cause or str(error))
    return report_error(error, state)


def write_final_status(state: RunState, final: State, reason: str = "") -> None:
    """Write the final status into the run folder, if it is this run's (rank 0).

    Raises:
        OSError: the file cannot be written.
    """
    if state.folder is not None and state.owns_folder:
        write_status(state.folder.status, final, state.step, reason)
        if final == "preempted":
            (state.folder.logs / STOPPED).touch()


def exit_hung(folder: RunFolder, state: RunState, problem: str) -> None:
    """End this process, from the watchdog's thread: the main thread waits for ever.

    Logging comes last and its time is limited: the main thread may be blocked inside a handler (a
    full pipe, a stalled file system), whose lock it then holds.
    """
    fault = HungError(_rank(), problem, f"see {folder.logs}/*.stacks")
    write_error_file(str(fault))
    first = True
    # A full disk must not keep the process alive: the log line has the reason as well.
    with suppress(OSError):
        first = report_once(folder.logs, str(fault))
        if first:
            write_status(folder.status, "failed", state.step, str(fault))
    exit_after(LOG_SECONDS)
    LOGGER.error("%s", fault, extra=None if first else FILE_ONLY)
    os._exit(EXIT_HUNG)


def report_error(error: MoeTrainError, state: RunState | None = None) -> int:
    """Log an error, on the console once, from rank 0; returns its exit code.

    The lost peer may be rank 0, and memory may run out on any rank: the first rank that
    reports one of these errors prints it.
    """
    logs = state.logs if state else None
    first = os.environ.get("RANK", "0") == "0"
    cause = None
    if error.exit_code in (EXIT_HUNG, EXIT_MEMORY):
        cause = peer_failure(logs)
        first = report_once(logs, str(error))
    write_error_file(f"ended because another rank failed: {cause}" if cause else str(error))
    LOGGER.error("%s", error, extra=None if first else FILE_ONLY)
    return error.exit_code
