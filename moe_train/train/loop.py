"""The training loop: when to step, validate, save, roll back and stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from moe_train.errors import Preempted
from moe_train.train.callback import (
    CallbackList,
    RollbackEvent,
    SaveEvent,
    StepEvent,
    ValidationEvent,
)
from moe_train.train.engine import Engine
from moe_train.train.forward import MicroBatch
from moe_train.train.metrics import StepWork, step_record
from moe_train.train.step import StepResult, require_finite, train_step, validate


class Source(Protocol):
    """Training batches; ``consumed`` is the data cursor, in samples of all replicas."""

    consumed: int

    def next_step(self) -> list[MicroBatch]:
        """This replica's micro-batches of the next step."""


class Saver(Protocol):
    """Writes checkpoints, perhaps while training continues; the same on every rank."""

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is not committed yet, on all ranks."""

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write."""

    def begin(self, step: int) -> None:
        """Start to save the state after ``step``, with no save pending; collective."""

    def finish(self) -> SaveEvent | None:
        """Wait for the pending save and commit it; None where there is none; collective."""


class StopSignals(Protocol):
    """Termination signals of this process."""

    @property
    def received(self) -> int | None:
        """Number of the first termination signal, None before one."""


class PhaseMonitor(Protocol):
    """Limits the time of each phase of the loop (the watchdog)."""

    def phase(self, name: str, step: int) -> AbstractContextManager[None]:
        """Everything inside belongs to phase ``name`` of ``step``."""


class StopTimes(Protocol):
    """Compares the time from a stop signal to a saved checkpoint with what the launcher allows."""

    def measure(self, part: str) -> AbstractContextManager[None]:
        """Measure ``part``, after which a stop signal is acted on."""

    def check(self, save_seconds: float) -> None:
        """Warn if a checkpoint cannot finish within the SIGTERM grace period."""


@dataclass
class Intervals:
    """When things happen, in steps; 0 switches a thing off."""

    steps: int
    validate: int
    save: int

    def due(self, every: int, step: int) -> bool:
        """Whether what happens every so many steps does after ``step``; always after the last."""
        return bool(every) and (step % every == 0 or step == self.steps)


@dataclass
class NonFinitePolicy:
    """What to do with a step whose loss or gradient norm is not finite."""

    policy: str
    """stop | skip | rollback (``train.non_finite``)."""
    limit: int
    """Such steps that are skipped or rolled back before the run stops."""
    roll_back: Callable[[], int]
    """Loads the newest checkpoint, moves the data cursor back to it and returns its step."""
    count: int = 0
    """Such steps so far."""

    def record(self, step: int, result: StepResult) -> None:
        """Count a step whose update was not applied.

        Raises:
            NonFiniteError: the policy is stop, or the limit is exceeded; the same on all ranks.
        """
        self.count += 1
        if self.policy == "stop":
            require_finite(step, result)
        elif self.count > self.limit:
            exceeded = f"train.non_finite_limit={self.limit} (train.non_finite={self.policy})"
            require_finite(step, result, f"exceeded {exceeded}")


def run_loop(
    engine: Engine,
    source: Source,
    validation: Callable[[], Sequence[Sequence[MicroBatch]]],
    *,
    start: int,
    intervals: Intervals,
    work: StepWork,
    unigram_entropy: float | None,
    callbacks: CallbackList,
    saver: Saver,
    signals: StopSignals,
    watchdog: PhaseMonitor,
    budget: StopTimes,
    non_finite: NonFinitePolicy,
) -> None:
    """Train from step ``start + 1`` to ``intervals.steps``.

    Args:
        validation: the micro-batches of one validation, by global batch.
        unigram_entropy: of the validation tokens, nats per token, for the validation records.
        saver: an asynchronous save is committed at the first step edge at which all ranks have
            written, before the next one begins, and before the loop ends.

    Raises:
        Preempted: a stop signal was received; the state is saved.
        NonFiniteError: see :class:`NonFinitePolicy`.
    """
    step = start

    def commit() -> None:
        with watchdog.phase("checkpoint", step):
            saved = saver.finish()
        if saved is not None:
            budget.check(saved.seconds)
            callbacks.notify(saved)

    if sync_control_flags(engine, signals, saver).stop and start < intervals.steps:
        raise _preempted(start, saved=start > 0)
    while step < intervals.steps:
        step += 1
        begin = time.perf_counter()
        training = watchdog.phase("training step", step)
        with training, budget.measure("training step"), engine.tracer.trace(step):
            result = train_step(engine, source.next_step(), step)
            engine.backend.synchronize()
        seconds = time.perf_counter() - begin
        if not result.applied:
            # The pending save is of a step that was finite.
            commit()
            non_finite.record(step, result)
            if non_finite.policy == "rollback":
                with watchdog.phase("rolling back", step):
                    step = non_finite.roll_back()
                callbacks.notify(RollbackEvent(step))
                continue
        flags = sync_control_flags(engine, signals, saver)
        if flags.written:
            commit()
        stop = flags.stop
        record = step_record(
            step,
            result,
            seconds=seconds,
            consumed_samples=source.consumed,
            peak_memory_bytes=flags.peak_memory,
            work=work,
            config=engine.config,
        )
        callbacks.notify(StepEvent(step, MappingProxyType(record), result))
        if not stop and intervals.due(intervals.validate, step):
            with watchdog.phase("validation", step), budget.measure("validation"):
                loss = validate(engine, validation())
            record = {"step": step, "valid_loss": loss}
            if unigram_entropy is not None:
                record["unigram_entropy"] = unigram_entropy
            callbacks.notify(ValidationEvent(step, MappingProxyType(record)))
            stop = sync_control_flags(engine, signals, saver).stop
        if intervals.due(intervals.save, step) or (stop and intervals.save):
            commit()
            with watchdog.phase("checkpoint", step):
                saver.begin(step)
            flags = sync_control_flags(engine, signals, saver)
            if stop or flags.stop or flags.written or step == intervals.steps:
                commit()
                flags = sync_control_flags(engine, signals, saver)
            stop = stop or flags.stop
        if stop and step < intervals.steps:
            raise _preempted(step, saved=bool(intervals.save))


def _preempted(step: int, *, saved: bool) -> Preempted:
    return Preempted(
        f"step {step}",
        "the run received a stop signal; "
        + ("its state is saved" if saved else "nothing is saved (checkpoint.every=0, or no step)"),
        "start it again with the same run.name to go on",
    )


class ControlFlags(NamedTuple):
    """What all ranks know together at the edge of a step."""

    peak_memory: int
    """Bytes, the largest of all ranks."""
    stop: bool
    """Whether any rank received a signal."""
    written: bool
    """Whether a save is pending that no rank has to wait for."""


def sync_control_flags(engine: Engine, signals: StopSignals, saver: Saver) -> ControlFlags:
    """Reduce memory, signals and the save's progress over the world; collective."""
    flags = torch.tensor(
        [
            engine.backend.peak_memory_bytes(),
            int(signals.received is not None),
            int(not saver.written),
        ],
        dtype=torch.int64,
    ).to(engine.backend.device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    peak, stop, writing = flags.tolist()
    return ControlFlags(int(peak), bool(stop), saver.pending and not writing)
