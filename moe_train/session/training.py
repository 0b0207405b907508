"""A training run: open, take up, train, close."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from moe_train.checkpoint.save import save_checkpoint
from moe_train.data.batches import BatchSource
from moe_train.data.datasets import build_datasets
from moe_train.monitor.recorder import Silent
from moe_train.session.opening import Session
from moe_train.session.records import describe_run, finish, open_recorder
from moe_train.session.restore import restore
from moe_train.session.standing import Follower, Standing
from moe_train.session.traces import TraceListener, plan_trace
from moe_train.train.interrupt import Interrupt
from moe_train.train.loop import Intervals, run_loop

if TYPE_CHECKING:
    from moe_train.data.batches import MicroBatch


def train(session: Session, standing: Standing, stack: ExitStack, begun: float) -> None:
    """Train an open session to its last step.

    Args:
        standing: kept up to date, on every rank.
        stack: closes what is opened here.
        begun: ``perf_counter`` at the start of the process.

    Raises:
        MoeTrainError: see the rooms.
    """
    config, folder, engine = session.config, session.folder, session.engine
    assert folder is not None
    _, manifest = restore(session, folder.checkpoints, config.checkpoint.resume)
    start, consumed = (manifest.step, manifest.consumed_samples) if manifest else (0, 0)
    datasets = _datasets(session, start, consumed)
    source = _source(session, datasets.train, consumed)
    standing.step = start
    if session.rank == 0 and not standing.taken_up:
        describe_run(folder, config, session.layout, start)
        standing.taken_up = True
    recorder = open_recorder(session, datasets, start, stack) if session.rank == 0 else None
    plan_trace(session, start)

    def validation() -> list[list[MicroBatch]]:
        same = _source(session, datasets.valid, 0)
        return [same.next_step() for _ in range(config.train.eval_batches)]

    with Interrupt() as interrupt:
        run_loop(
            engine,
            source,
            validation,
            start=start,
            intervals=Intervals(
                config.train.steps, config.train.eval_every, config.checkpoint.every
            ),
            tokens_per_step=session.batch * config.data.sequence,
            listener=Follower(TraceListener(recorder or Silent(), session), standing),
            save=_saver(session, source),
            interrupt=interrupt,
        )
    if recorder is not None:
        finish(recorder, folder, time.perf_counter() - begun)


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
    return BatchSource(dataset, session.batch, micro, data.rank(), data.size(), consumed)


def _saver(session: Session, source: BatchSource) -> Callable[[int], None]:
    config, folder, engine = session.config, session.folder, session.engine
    assert folder is not None

    def save(step: int) -> None:
        save_checkpoint(
            folder.checkpoints,
            step=step,
            chunks=[chunk.module for chunk in engine.chunks],
            optimizer=engine.optimizer,
            keep=config.checkpoint.keep,
            facts=session.facts()
            | {
                "consumed_samples": source.consumed,
                "consumed_tokens": source.consumed * config.data.sequence,
            },
        )

    return save
