"""The loop: when to step, validate, save and stop. What these do lies elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from moe_train.errors import NonFiniteError, Preempted
from moe_train.train.engine import Engine
from moe_train.train.forward import MicroBatch
from moe_train.train.protocols import PhaseMonitor, Saver, Source, StopSignals, StopTimes
from moe_train.train.step import StepResult, train_step, validate


class Listener(Protocol):
    """Hears about every step, on every rank."""

    def on_step(self, record: dict[str, Any], result: StepResult) -> None:
        """A training step is done; ``record`` is its line of metrics.jsonl."""

    def on_validation(self, record: dict[str, Any]) -> None:
        """A validation is done."""


@dataclass
class Intervals:
    """When things happen, in steps; 0 switches a thing off."""

    steps: int
    validate: int
    save: int

    def validates(self, step: int) -> bool:
        """Whether to validate after ``step``; the last step always counts."""
        return bool(self.validate) and (step % self.validate == 0 or step == self.steps)

    def saves(self, step: int) -> bool:
        """Whether to save after ``step``; the last step always counts."""
        return bool(self.save) and (step % self.save == 0 or step == self.steps)


@dataclass
class Tolerance:
    """How many non-finite steps a run gets over, and how."""

    policy: str
    """stop | skip | rollback."""
    limit: int
    roll_back: Callable[[], int]
    """Loads the last good checkpoint, moves the data back to it and returns its step."""
    found: int = 0

    def meet(self, step: int, result: StepResult) -> None:
        """Count a step that was not applied.

        Raises:
            NonFiniteError: one too many.
        """
        self.found += 1
        if self.found > self.limit:
            raise NonFiniteError(
                f"step {step}",
                f"loss is {result.loss}, gradient norm is {result.grad_norm}; "
                f"train.non_finite={self.policy} got over {self.limit} such steps before",
                "resume from the last checkpoint with a lower optim.lr or other data",
            )


def run_loop(
    engine: Engine,
    source: Source,
    validation: Callable[[], Sequence[Sequence[MicroBatch]]],
    *,
    start: int,
    intervals: Intervals,
    tokens_per_step: int,
    listener: Listener,
    saver: Saver,
    signals: StopSignals,
    watchdog: PhaseMonitor,
    budget: StopTimes,
    tolerance: Tolerance,
) -> None:
    """Train from step ``start + 1`` to ``intervals.steps``.

    Args:
        validation: the micro-batches of one validation, by global batch.
        tokens_per_step: tokens of a global batch.
        saver: a save that it writes beside the training is finished at the first step edge at
            which all ranks have written, before the next one, and before the loop ends.

    Raises:
        Preempted: a stop was asked for; the state is saved.
        NonFiniteError: see :func:`moe_train.train.step.train_step` and :class:`Tolerance`.
    """
    step = start

    def finish() -> None:
        with watchdog.phase("checkpoint", step):
            seconds = saver.finish()
        if seconds is not None:
            budget.check(seconds)

    if _agree(engine, signals, saver).stop and start < intervals.steps:
        raise _preempted(start, saved=start > 0)
    while step < intervals.steps:
        step += 1
        begun = time.perf_counter()
        training = watchdog.phase("training step", step)
        tolerate = tolerance.policy != "stop"
        try:
            with training, budget.measure("training step"), engine.tracer.watch(step):
                result = train_step(engine, source.next_step(), step, tolerate=tolerate)
                engine.backend.synchronize()
        except NonFiniteError:
            # What is on its way is of a step that was good.
            finish()
            raise
        seconds = time.perf_counter() - begun
        if not result.applied:
            finish()
            tolerance.meet(step, result)
            if tolerance.policy == "rollback":
                with watchdog.phase("rolling back", step):
                    step = tolerance.roll_back()
                continue
        agreed = _agree(engine, signals, saver)
        if agreed.written:
            finish()
        stop = agreed.stop
        record = {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "consumed_samples": source.consumed,
            "consumed_tokens": source.consumed * engine.config.data.sequence,
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_step / seconds,
            "peak_memory_bytes": agreed.peak_memory,
            "load_imbalance": result.routing.load_imbalance,
            "dropped_tokens": result.routing.dropped,
            "aux_loss": result.routing.aux_loss,
            "z_loss": result.routing.z_loss,
        }
        if engine.config.model.router.force_balance:
            record["force_balance"] = True
        if not result.applied:
            record["skipped"] = True
        listener.on_step(record, result)
        if not stop and intervals.validates(step):
            with watchdog.phase("validation", step), budget.measure("validation"):
                loss = validate(engine, validation())
            listener.on_validation({"step": step, "valid_loss": loss})
            stop = _agree(engine, signals, saver).stop
        if intervals.saves(step) or (stop and intervals.save):
            with watchdog.phase("checkpoint", step):
                saver.begin(step)
            agreed = _agree(engine, signals, saver)
            if stop or agreed.stop or agreed.written or step == intervals.steps:
                finish()
                agreed = _agree(engine, signals, saver)
            stop = stop or agreed.stop
        if stop and step < intervals.steps:
            raise _preempted(step, saved=bool(intervals.save))


def _preempted(step: int, *, saved: bool) -> Preempted:
    return Preempted(
        f"step {step}",
        "a signal asked the run to stop; "
        + ("its state is saved" if saved else "nothing is saved (checkpoint.every=0, or no step)"),
        "start it again with the same run.name to go on",
    )


class _Agreed(NamedTuple):
    peak_memory: int
    """The largest of all ranks."""
    stop: bool
    """Whether any rank was asked to stop."""
    written: bool
    """Whether a save is on its way that no rank has to wait for."""


def _agree(engine: Engine, signals: StopSignals, saver: Saver) -> _Agreed:
    facts = torch.tensor(
        [
            engine.backend.peak_memory_bytes(),
            int(signals.received is not None),
            int(not saver.written),
        ],
        dtype=torch.int64,
    ).to(engine.backend.device)
    dist.all_reduce(facts, op=dist.ReduceOp.MAX)
    peak, stop, writing = facts.tolist()
    return _Agreed(int(peak), bool(stop), saver.pending and not writing)
