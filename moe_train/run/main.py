"""Entry of every rank: resolve overrides, acquire the run folder, open, train, exit code."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import moe_train
from moe_train.checkpoint.folders import recover_interrupted_commit
from moe_train.config.sweep import expand_multirun, suffixes
from moe_train.errors import (
    EXIT_FINISHED,
    EXIT_HUNG,
    EXIT_MEMORY,
    EXIT_PREEMPTED,
    ConfigError,
    MoeTrainError,
    Preempted,
)
from moe_train.parallel.resolved import ResolvedRun
from moe_train.run.failure import (
    STOPPED,
    diagnose,
    end_run,
    report_error,
    report_once,
    write_final_status,
)
from moe_train.run.logs import FILE_ONLY, log_to_file, logging_to_console
from moe_train.run.resolution import resolve_on_all_ranks
from moe_train.run.signals import SignalHandler, terminate_with_launcher
from moe_train.run.state import RunState
from moe_train.run.torchelastic import restarts, world_of_process, write_error_file
from moe_train.run_folder.folder import (
    RunFolder,
    create_run_folder,
    default_run_name,
    run_folder_path,
)
from moe_train.run_folder.lock import lock_run_folder
from moe_train.run_folder.status import read_status
from moe_train.train.callback import Callback

LOGGER = logging.getLogger(__name__)
MULTIRUN = ("-m", "--multirun")
HELP = """usage: moe-train train [overrides ...]   or   python train.py [overrides ...]

Train on this process's rank. One process is one rank; for several, start
  torchrun --nproc-per-node 8 train.py [overrides ...]

examples:
  moe-train train                                  chooses device, experiment and layout
  moe-train train experiment=single train.steps=20
  moe-train train data.train=[data/notes] run.name=notes
  moe-train train --multirun optim.lr=1e-3,3e-3 experiment=single

Overrides are key=value; moe-train plan shows what they lead to and names every fault.
"""


def main(argv: Sequence[str], callbacks: Sequence[Callback] = ()) -> int:
    """Train with Hydra overrides; ``-m a=1,2`` runs every combination in turn.

    Args:
        callbacks: your own, called on every rank after the built-in ones; see ``Callback``.

    Returns:
        The rank's exit code; the first failed job's, for several.
    """
    rank, world = world_of_process()
    if {"-h", "--help"} & set(argv):
        if rank == 0:
            print(HELP)
        return EXIT_FINISHED
    if "--version" in argv:
        if rank == 0:
            print(f"moe_train {moe_train.__version__}")
        return EXIT_FINISHED
    overrides = [arg for arg in argv if arg not in MULTIRUN]
    multirun = len(overrides) < len(argv)
    codes: list[int] = []
    with SignalHandler() as signals, logging_to_console():
        terminate_with_launcher()
        try:
            jobs = expand_multirun(overrides) if multirun else [overrides]
        except MoeTrainError as fault:
            return report_error(fault)
        for number, (job, suffix) in enumerate(zip(jobs, suffixes(jobs), strict=True), start=1):
            if multirun:
                LOGGER.info("job %d of %d: %s", number, len(jobs), " ".join(job))
            codes.append(train(job, signals, suffix, callbacks))
            # A signal stops the whole sweep, and a world without one of its ranks is over.
            ends = (EXIT_PREEMPTED, EXIT_HUNG, *([EXIT_MEMORY] if world > 1 else []))
            if codes[-1] in ends:
                break
    return next((code for code in codes if code != EXIT_FINISHED), EXIT_FINISHED)


def train(
    overrides: Sequence[str],
    signals: SignalHandler,
    suffix: str = "",
    callbacks: Sequence[Callback] = (),
) -> int:
    """One run on this rank, from resolution to exit code.

    Args:
        signals: of the whole process: a signal in the last step of a sweep's job stops the next
            one before its first step, on all ranks.
        suffix: of the run's name, to tell the jobs of a sweep apart.
        callbacks: the caller's own.
    """
    begin = time.perf_counter()
    rank, world = world_of_process()
    state = RunState()
    try:
        run = resolve_on_all_ranks(overrides, world, partial(exit_if_preempted, suffix=suffix))
        fault: MoeTrainError | None = None
        if rank == 0:
            try:
                acquire_run_folder(run, suffix, state)
                announce(run)
            except ConfigError as refused:
                # The peers are about to open the world: open_session raises it on all ranks.
                fault = refused
        if fault is not None and world == 1:
            raise fault
        from moe_train.run.opening import open_session

        with ExitStack() as stack:
            try:
                session = open_session(
                    run, rank, stack, folder=state.folder, fault=fault, joined=state.join
                )
                kernels = session.engine.backend.kernels
                LOGGER.info("kernels %s (%s)", kernels.kernels.name, kernels.why)
                # It imports Megatron, which must come after the backend's preparation.
                from moe_train.run.training import training_loop

                training_loop(session, state, stack, begin, signals, callbacks)()
            except BaseException as failure:
                state.error = diagnose(failure, state, run)
                if state.error is None or state.error is failure:
                    raise
                raise state.error from failure
        # After all callbacks and the close of the world, which may still fail the run.
        write_final_status(state, "finished")
        return EXIT_FINISHED
    except MoeTrainError as fault:
        return end_run(state.error or fault, state)
    except BaseException as crash:
        from moe_train.backend.groups import lost_peer

        # Closing the process groups may fail after the failure that ended the run.
        if (known := state.error or lost_peer(crash)) is not None:
            return end_run(known, state)
        write_error_file(traceback.format_exc())
        LOGGER.critical("the run ends with", exc_info=crash, extra=FILE_ONLY)
        report_once(state.logs, f"{type(crash).__name__}: {crash}")
        write_final_status(state, "failed", f"{type(crash).__name__}: {crash}")
        raise
    finally:
        if state.lock is not None:
            state.lock.release()
        log_to_file(None)


def exit_if_preempted(run: ResolvedRun, suffix: str) -> None:
    """Refuse to resume a preempted run where torchrun restarts its ranks as if it had failed.

    Every rank checks by itself, before torch is imported: the time until a scheduler kills the job
    is short. A rank that cannot see the folder is ended by torchrun with the others.

    Raises:
        Preempted: the run was preempted before this start.
    """
    if restarts()[0] == 0:
        return
    folder = RunFolder(run_folder_path(run.config.run.dir, *_names(run, suffix)))
    status = read_status(folder.status)
    # The status alone may be an earlier job's: this one may have failed before it wrote its own.
    if status is not None and status.state == "preempted" and (folder.logs / STOPPED).exists():
        raise Preempted(
            f"step {status.step}",
            "the run was preempted, and a restart of its ranks does not resume it",
            "start it again with the same run.name to resume",
        )


def _names(run: ResolvedRun, suffix: str) -> tuple[str | None, str]:
    """``run.name``, and the name where it is null, each with the suffix of a sweep's job."""
    named = run.config.run.name
    default = default_run_name(run.config.experiment, run.layout.tag)
    return named + suffix if named else None, default + suffix


def acquire_run_folder(run: ResolvedRun, suffix: str, state: RunState) -> None:
    """Create the run folder, or find the one that is there (rank 0).

    A new one is described at once; one with an earlier run's files is left as it is until this
    run is known to continue it.

    Raises:
        ConfigError: the folder cannot be written, or another job trains in it.
    """
    folder = create_run_folder(
        run.config.run.dir,
        *_names(run, suffix),
        # Ranks that are started again belong to the run that their first start opened.
        fresh=run.config.checkpoint.resume == "never" and restarts()[0] == 0,
    )
    state.lock = lock_run_folder(folder.path)
    recover_interrupted_commit(folder.checkpoints)
    state.folder = folder
    if restarts()[0] == 0:
        (folder.logs / STOPPED).unlink(missing_ok=True)
    state.continues = folder.config.exists()
    if not state.continues:
        state.describe(run.with_name(folder.path.name))


def announce(run: ResolvedRun) -> None:
    """Print experiment, device and layout (rank 0)."""
    config, layout = run.config, run.layout
    why = f" ({config.experiment_reason})" if config.experiment_reason else ""
    LOGGER.info("experiment %s%s", config.experiment, why)
    if config.hardware.device:
        hardware = config.hardware
        LOGGER.info("device %s: %s, profile %s", config.device, hardware.device, hardware.name)
    LOGGER.info(
        f"layout {layout.tag} on {layout.world} rank(s): tensor {layout.tensor}, pipeline "
        f"{layout.pipeline}, expert {layout.expert}, data {layout.data}, "
        f"placement {layout.placement}"
    )
    if restarts()[1] and config.checkpoint.resume != "auto":
        LOGGER.warning(
            f"checkpoint.resume={config.checkpoint.resume} applies to every restart: after a "
            "failure the ranks start there again, not at this run's own last checkpoint"
        )
