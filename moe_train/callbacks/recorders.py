"""Callbacks that write metrics.jsonl, experts/tokens.jsonl and status.json (rank 0)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from moe_train.callbacks.summary import RunSummary, summarise
from moe_train.run_folder.metrics import JsonLines, read
from moe_train.run_folder.status import write_status
from moe_train.train.callback import Callback, EndEvent, StartEvent, StepEvent, ValidationEvent

STATUS_SECONDS = 5.0
"""Between two updates of status.json while the run goes on."""


class MetricsRecorder(Callback):
    """One line of metrics.jsonl a step or validation, on disk before the next step.

    Args:
        path: metrics.jsonl.
        begin: ``perf_counter`` at the start of the process.

    Attributes:
        summary: of the whole run, once it is finished.
    """

    required = True

    def __init__(self, path: Path, begin: float) -> None:
        self._path, self._begin = path, begin
        self.summary: RunSummary | None = None

    def on_start(self, event: StartEvent) -> None:
        """Drop the lines of steps that are trained again.

        Raises:
            DataError: a line of an earlier start is damaged.
        """
        read(self._path)
        self._lines = JsonLines(self._path, event.step)

    def on_step(self, event: StepEvent) -> None:
        """Write the step's line."""
        self._lines.append(event.record)

    def on_validation(self, event: ValidationEvent) -> None:
        """Write the validation's line."""
        self._lines.append(event.record)

    def on_rollback(self, step: int) -> None:
        """Drop the lines of steps that are trained again."""
        self._lines.truncate_after(step)

    def on_end(self, event: EndEvent) -> None:
        """Close the file; summarise a finished run."""
        if hasattr(self, "_lines"):
            self._lines.close()
        if event.error is None:
            seconds = time.perf_counter() - self._begin
            self.summary = summarise(
                read(self._path),
                state=event.state,
                wall_seconds=seconds,
                run_folder=self._path.parent,
            )


class ExpertLoad(Callback):
    """One line of experts/tokens.jsonl a step: the tokens of every layer's every expert."""

    required = True

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_start(self, event: StartEvent) -> None:
        """Drop the lines of steps that are trained again."""
        self._lines = JsonLines(self._path, event.step)

    def on_step(self, event: StepEvent) -> None:
        """Write the step's counts, [layers, experts]."""
        counts = event.result.routing.tokens_LE.long().tolist()
        self._lines.append({"step": event.step, "tokens": counts})

    def on_rollback(self, step: int) -> None:
        """Drop the lines of steps that are trained again."""
        self._lines.truncate_after(step)

    def on_end(self, event: EndEvent) -> None:
        """Close the file."""
        if hasattr(self, "_lines"):
            self._lines.close()


class StatusWriter(Callback):
    """The running and finished states of status.json; other ends are the runtime's to write.

    Args:
        clock: seconds, for the time between two updates.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock

    def on_start(self, event: StartEvent) -> None:
        """The run's description has written the state already."""
        self._latest = self._clock()

    def on_step(self, event: StepEvent) -> None:
        """Update the step now and then; it is exact once the run has ended."""
        if self._clock() - self._latest >= STATUS_SECONDS:
            self._latest = self._clock()
            write_status(self._path, "running", event.step, durable=False)

    def on_end(self, event: EndEvent) -> None:
        """Write the end of a finished run."""
        if event.error is None:
            write_status(self._path, "finished", event.step)
