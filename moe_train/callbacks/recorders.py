"""Callbacks that write metrics.jsonl, experts/tokens.jsonl and status.json (rank 0)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from moe_train.callbacks.summary import RunSummary, summarise
from moe_train.run_folder.metrics import JsonLines, read
from moe_train.run_folder.status import write_status
from moe_train.train.callback import (
    Callback,
    EndEvent,
    RollbackEvent,
    StartEvent,
    StepEvent,
    ValidationEvent,
)

STATUS_SECONDS = 5.0
"""Between two updates of status.json while the run goes on."""


class StepRecorder(Callback):
    """Writes a file with one line a step; lines of steps that are trained again are dropped."""

    required = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, event: StartEvent) -> None:
        """Open the file."""
        self.lines = JsonLines(self.path, event.step)

    def on_rollback(self, event: RollbackEvent) -> None:
        """Truncate the file."""
        self.lines.truncate_after(event.step)

    def on_end(self, event: EndEvent) -> None:
        """Close the file."""
        self.lines.close()


class MetricsRecorder(StepRecorder):
    """metrics.jsonl: a line for each step and validation, on disk before the next step.

    Args:
        begin: ``perf_counter`` at the start of the process.

    Attributes:
        summary: of the whole run, once it is finished.
    """

    def __init__(self, path: Path, begin: float) -> None:
        super().__init__(path)
        self._begin = begin
        self.summary: RunSummary | None = None

    def on_start(self, event: StartEvent) -> None:
        """Open the file.

        Raises:
            DataError: a line of an earlier start is damaged.
        """
        read(self.path)
        super().on_start(event)

    def on_step(self, event: StepEvent) -> None:
        """Write the step's line."""
        self.lines.append(event.record)

    def on_validation(self, event: ValidationEvent) -> None:
        """Write the validation's line."""
        self.lines.append(event.record)

    def on_end(self, event: EndEvent) -> None:
        """Close the file; summarise a finished run."""
        super().on_end(event)
        if event.error is None:
            self.summary = summarise(
                read(self.path),
                state=event.state,
                wall_seconds=time.perf_counter() - self._begin,
                run_folder=self.path.parent,
            )


class ExpertLoad(StepRecorder):
    """experts/tokens.jsonl: the tokens of every layer's every expert, a line a step."""

    def on_step(self, event: StepEvent) -> None:
        """Write the step's counts, [layers, experts]."""
        counts = event.result.routing.tokens_LE.long().tolist()
        self.lines.append({"step": event.step, "tokens": counts})


class StatusWriter(Callback):
    """The step in status.json while the run goes on; its end is the runtime's to write.

    It is not ``required``: a run does not fail with an update that the next one replaces.

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
