"""The loop: when to step, validate, save and stop. What these do lies elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moe_train.errors import NonFiniteError, Preempted
from moe_train.train.engine import Engine
from moe_train.train.forward import MicroBatch
from moe_train.train.grace import Grace
from moe_train.train.interrupt import Interrupt
from moe_train.train.step import StepResult, train_step, validate
from moe_train.train.watchdog import Watchdog


class Source(Protocol):
    """Where batches come from; ``consumed`` is the data cursor, in samples of all replicas."""

    consumed: int

    def next_step(self) -> list[MicroBatch]:
        """This replica's micro-batches of the next step."""


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
    save: Callable[[int], None],
    interrupt: Interrupt,
    watchdog: Watchdog,
    grace: Grace,
    tolerance: Tolerance,
) -> None:
    """Train from step ``start + 1`` to ``intervals.steps``.

    Args:
        validation: the micro-batches of one validation, by global batch.
        tokens_per_step: tokens of a global batch.
        save: writes a checkpoint of the state after the given step; collective.

    Raises:
        Preempted: a stop was asked for; the state is saved.
        NonFiniteError: see :func:`moe_train.train.step.train_step` and :class:`Tolerance`.
    """
    step = start
    if _agree(engine, interrupt)[1] and start < intervals.steps:
        raise _preempted(start, saved=start > 0)
    while step < intervals.steps:
        step += 1
        begun = time.perf_counter()
        training = watchdog.phase("training step", step)
        with training, grace.part("training step"), engine.tracer.watch(step):
            tolerate = tolerance.policy != "stop"
            result = train_step(engine, source.next_step(), step, tolerate=tolerate)
            engine.backend.synchronize()
        seconds = time.perf_counter() - begun
        if not result.applied:
            tolerance.meet(step, result)
            if tolerance.policy == "rollback":
                with watchdog.phase("rolling back", step):
                    step = tolerance.roll_back()
                continue
        peak_memory, stop = _agree(engine, interrupt)
        record = {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "consumed_samples": source.consumed,
            "consumed_tokens": source.consumed * engine.config.data.sequence,
            "step_seconds": seconds,
            "tokens_per_second": tokens_per_step / seconds,
            "peak_memory_bytes": peak_memory,
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
            with watchdog.phase("validation", step), grace.part("validation"):
                loss = validate(engine, validation())
            listener.on_validation({"step": step, "valid_loss": loss})
            stop = _agree(engine, interrupt)[1]
        if intervals.saves(step) or (stop and intervals.save):
            with watchdog.phase("checkpoint", step), grace.part("checkpoint"):
                save(step)
            stop = stop or _agree(engine, interrupt)[1]
        if stop and step < intervals.steps:
            raise _preempted(step, saved=bool(intervals.save))


def _preempted(step: int, *, saved: bool) -> Preempted:
    return Preempted(
        f"step {step}",
        "a signal asked the run to stop; "
        + ("its state is saved" if saved else "nothing is saved (checkpoint.every=0, or no step)"),
        "start it again with the same run.name to go on",
    )


def _agree(engine: Engine, interrupt: Interrupt) -> tuple[int, bool]:
    """Largest peak memory of all ranks, and whether any rank was asked to stop."""
    facts = torch.tensor(
        [engine.backend.peak_memory_bytes(), int(interrupt.signal is not None)], dtype=torch.int64
    ).to(engine.backend.device)
    dist.all_reduce(facts, op=dist.ReduceOp.MAX)
    peak, stop = facts.tolist()
    return int(peak), bool(stop)
