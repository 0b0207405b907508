"""A training run on an open session: restore, build the callbacks, make the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from moe_train.callbacks.garbage import GarbageCollection
from moe_train.callbacks.progress import ConsoleProgress
from moe_train.callbacks.recorders import ExpertLoad, MetricsRecorder, StatusWriter
from moe_train.callbacks.trace import StepTrace, TorchProfiler
from moe_train.callbacks.wandb import WandbFollower
from moe_train.checkpoint.folders import prune
from moe_train.config.schema import to_mapping
from moe_train.data.batches import BatchSource, MicroBatch
from moe_train.data.datasets import build_datasets
from moe_train.data.statistics import dataset_entropy
from moe_train.errors import NonFiniteError
from moe_train.parallel.flops import flops_per_token
from moe_train.run.failure import exit_hung, peer_failure
from moe_train.run.opening import Session
from moe_train.run.restore import restore
from moe_train.run.saving import Saver
from moe_train.run.shutdown_budget import ShutdownBudget, grace_seconds
from moe_train.run.signals import SignalHandler
from moe_train.run.state import RunState
from moe_train.run.watchdog import Watchdog
from moe_train.run.weights import start_from
from moe_train.run_folder.folder import RunFolder
from moe_train.train.callback import Callback, CallbackList, StartEvent
from moe_train.train.loop import Intervals, NonFinitePolicy, run_loop
from moe_train.train.metrics import StepWork, device_peak

LOGGER = logging.getLogger(__name__)


def training_loop(
    session: Session,
    state: RunState,
    stack: ExitStack,
    begin: float,
    signals: SignalHandler,
    callbacks: Sequence[Callback] = (),
) -> Callable[[], None]:
    """Restore an open session and return the loop that trains it to its last step.

    Args:
        state: kept up to date, on every rank.
        stack: closes what is opened here.
        begin: ``perf_counter`` at the start of the process.
        callbacks: the caller's own, called after the built-in ones.

    Raises:
        CheckpointError: the checkpoint to resume or start from is damaged or of another model.
        DataError: the corpus or the run folder's metrics cannot be read.
    """
    config, folder, engine = session.config, session.folder, session.engine
    assert folder is not None
    checkpoint, manifest = restore(
        session, folder.checkpoints, config.checkpoint.resume, state=state
    )
    if session.rank == 0 and checkpoint is not None and checkpoint.parent == folder.checkpoints:
        prune(checkpoint, config.checkpoint.keep)
    if manifest is None and config.checkpoint.init is not None:
        start_from(session, config.checkpoint.init)
    start, consumed = (manifest.step, manifest.consumed_samples) if manifest else (0, 0)
    datasets = _datasets(session, start, consumed)
    source = _source(session, datasets.train, consumed)
    entropy = None
    if session.rank == 0:
        state.describe(session.run, engine.backend.kernels)
        if datasets.valid is not None:
            entropy = dataset_entropy(
                datasets.valid, config.train.eval_batches * session.run.sequences
            )
    built_in = build_callbacks(session, folder, state, begin)
    all_callbacks = stack.enter_context(CallbackList([*built_in, *callbacks]))
    all_callbacks.start(StartEvent(start, session.rank, session.run, folder.path))

    def validation() -> list[list[MicroBatch]]:
        same = _source(session, datasets.valid, 0)
        return [same.next_step() for _ in range(config.train.eval_batches)]

    watchdog = Watchdog(
        folder.logs,
        session.rank,
        session.layout.world,
        config.backend.timeout_seconds,
        partial(exit_hung, folder, state),
        partial(peer_failure, folder.logs),
    )
    return partial(
        run_loop,
        engine,
        source,
        validation,
        start=start,
        intervals=Intervals(config.train.steps, config.train.eval_every, config.checkpoint.every),
        work=StepWork(
            session.run.tokens,
            flops_per_token(config.model, config.data.sequence, session.run.vocab).total,
            device_peak(config) * engine.backend.devices(session.layout.world),
        ),
        unigram_entropy=entropy,
        callbacks=all_callbacks,
        saver=Saver(session, source),
        signals=signals,
        watchdog=stack.enter_context(watchdog),
        budget=ShutdownBudget(grace_seconds(), LOGGER.warning),
        non_finite=NonFinitePolicy(
            config.train.non_finite,
            config.train.non_finite_limit,
            partial(_roll_back, session, source),
        ),
    )


def build_callbacks(
    session: Session, folder: RunFolder, state: RunState, begin: float
) -> list[Callback]:
    """The built-in callbacks of this rank, in the order in which they are called."""
    config = session.config
    callbacks: list[Callback] = [state]
    if config.train.trace:
        callbacks.append(StepTrace(session.engine.tracer, folder.trace, session.layout.tag))
    if config.train.profile_steps:
        device = session.engine.backend.device
        callbacks.append(TorchProfiler(config.train.profile_steps, folder.logs, device))
    if session.rank == 0:
        metrics = MetricsRecorder(folder.metrics, begin)
        callbacks += [
            metrics,
            ExpertLoad(folder.tokens),
            StatusWriter(folder.status),
            ConsoleProgress(config.log.console, config.train.log_every, metrics),
            WandbFollower(
                config.log.wandb,
                project=config.log.wandb_project,
                folder=folder,
                config=to_mapping(config),
                metrics=metrics,
            ),
        ]
    return [*callbacks, GarbageCollection(config.train.gc_every)]


def _roll_back(session: Session, source: BatchSource) -> int:
    """Load the newest checkpoint of this run; returns its step."""
    assert session.folder is not None
    _, manifest = restore(session, session.folder.checkpoints, "auto")
    if manifest is None:
        raise NonFiniteError(
            "train.non_finite",
            "rollback: there is no checkpoint yet to go back to",
            "start again with a lower optim.lr or other data, or a smaller checkpoint.every",
        )
    source.consumed = manifest.consumed_samples
    return manifest.step


def _datasets(session: Session, start: int, consumed: int) -> Any:
    config, batch = session.config, session.run.sequences
    validates = config.train.eval_every > 0
    return build_datasets(
        config.data,
        sequence=config.data.sequence,
        seed=config.run.seed,
        train_samples=consumed + max(1, config.train.steps - start) * batch,
        valid_samples=config.train.eval_batches * batch if validates else 0,
        vocab_limit=session.run.vocab,
        corpus=session.corpus,
    )


def _source(session: Session, dataset: Any, consumed: int) -> BatchSource:
    data = session.engine.groups.dp
    micro = session.config.batch.micro
    return BatchSource(
        dataset, session.run.sequences, micro, data.rank(), data.size(), consumed, session.run.vocab
    )
