"""A training run: open, take up, train, close."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from moe_train.callbacks.recorder import Silent
from moe_train.checkpoint.folders import drop_earlier
from moe_train.data.batches import BatchSource
from moe_train.data.datasets import build_datasets
from moe_train.errors import HungError, NonFiniteError
from moe_train.run.failure import peer_failure, report_once
from moe_train.run.garbage import Collecting
from moe_train.run.opening import Session
from moe_train.run.records import describe_run, finish, open_recorder
from moe_train.run.restore import restore
from moe_train.run.saving import Saver
from moe_train.run.shutdown_budget import ShutdownBudget, grace_seconds
from moe_train.run.signals import SignalHandler
from moe_train.run.state import Follower, RunState
from moe_train.run.torchelastic import write_error_file
from moe_train.run.traces import TraceListener, plan_trace
from moe_train.run.watchdog import Watchdog
from moe_train.run_folder.folder import RunFolder
from moe_train.run_folder.status import write_status
from moe_train.train.loop import Intervals, Tolerance, run_loop

if TYPE_CHECKING:
    from moe_train.callbacks.recorder import Recorder
    from moe_train.data.batches import MicroBatch


def train(
    session: Session, state: RunState, stack: ExitStack, begun: float, signals: SignalHandler
) -> None:
    """Train an open session to its last step.

    Args:
        state: kept up to date, on every rank.
        stack: closes what is opened here.
        begun: ``perf_counter`` at the start of the process.
        signals: handled since then.

    Raises:
        MoeTrainError: see the rooms.
    """
    config, folder, engine = session.config, session.folder, session.engine
    assert folder is not None
    found, manifest = restore(session, folder.checkpoints, config.checkpoint.resume)
    if session.rank == 0 and found is not None and found.parent == folder.checkpoints:
        drop_earlier(found, config.checkpoint.keep)
    start, consumed = (manifest.step, manifest.consumed_samples) if manifest else (0, 0)
    datasets = _datasets(session, start, consumed)
    source = _source(session, datasets.train, consumed)
    state.step = start
    if session.rank == 0:
        describe_run(folder, config, session.layout, start, engine.backend.kernels)
        state.owns_folder = True
    recorder = open_recorder(session, datasets, start, stack) if session.rank == 0 else None
    plan_trace(session, start)

    listener = Follower(TraceListener(recorder or Silent(), session), state)

    def validation() -> list[list[MicroBatch]]:
        same = _source(session, datasets.valid, 0)
        return [same.next_step() for _ in range(config.train.eval_batches)]

    with Watchdog(
        folder.logs,
        session.rank,
        session.world,
        config.backend.timeout_seconds,
        partial(_hung, folder, state),
        partial(peer_failure, folder.logs),
    ) as watchdog:
        run_loop(
            engine,
            source,
            validation,
            start=start,
            intervals=Intervals(
                config.train.steps, config.train.eval_every, config.checkpoint.every
            ),
            tokens_per_step=session.batch * config.data.sequence,
            listener=stack.enter_context(Collecting(listener, config.train.gc_every)),
            saver=Saver(session, source),
            signals=signals,
            watchdog=watchdog,
            budget=ShutdownBudget(
                grace_seconds(), recorder.progress.message if recorder else _unheard
            ),
            tolerance=Tolerance(
                config.train.non_finite,
                config.train.non_finite_limit,
                partial(_roll_back, session, source, recorder),
            ),
        )
    if recorder is not None:
        finish(recorder, folder, time.perf_counter() - begun)


def _unheard(text: str) -> None:
    """Rank 0 says it."""


def _hung(folder: RunFolder, state: RunState, verdict: str) -> None:
    """End this process, from the watchdog's thread: the main thread waits for ever."""
    fault = HungError(f"rank {os.environ.get('RANK', '0')}", verdict, f"see {folder.logs}/*.stacks")
    write_error_file(str(fault))
    if report_once(folder.logs, str(fault)):
        print(f"moe_train: {fault}", file=sys.stderr, flush=True)
        write_status(folder.status, "failed", state.step, str(fault))
    os._exit(fault.exit_code)


def _roll_back(session: Session, source: BatchSource, recorder: Recorder | None) -> int:
    """Go back to the newest good checkpoint of this run; returns its step."""
    assert session.folder is not None
    _, manifest = restore(session, session.folder.checkpoints, "auto")
    if manifest is None:
        raise NonFiniteError(
            "train.non_finite",
            "rollback: there is no checkpoint yet to go back to",
            "start again with a lower optim.lr or other data, or a smaller checkpoint.every",
        )
    source.consumed = manifest.consumed_samples
    if recorder is not None:
        recorder.truncate_after(manifest.step)
    return manifest.step


def _datasets(session: Session, start: int, consumed: int) -> Any:
    config, batch = session.config, session.batch
    validates = config.train.eval_every > 0
    return build_datasets(
        config.data,
        sequence=config.data.sequence,
        seed=config.run.seed,
        train_samples=consumed + max(1, config.train.steps - start) * batch,
        valid_samples=config.train.eval_batches * batch if validates else 0,
        vocab_limit=session.vocab,
        corpus=session.corpus,
    )


def _source(session: Session, dataset: Any, consumed: int) -> BatchSource:
    data = session.engine.groups.dp
    micro = session.config.batch.micro
    return BatchSource(
        dataset, session.batch, micro, data.rank(), data.size(), consumed, session.vocab
    )
