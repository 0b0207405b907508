"""Protocols of what the training loop is given: data, checkpoints, stop signals, watchdog."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from moe_train.train.callback import SaveEvent
from moe_train.train.forward import MicroBatch


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
