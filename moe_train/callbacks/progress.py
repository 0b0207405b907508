"""Console progress of a run: a bar on a terminal, plain lines elsewhere (``log.console``)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from moe_train.callbacks.recorders import MetricsRecorder
from moe_train.callbacks.summary import render_summary
from moe_train.train.callback import (
    Callback,
    EndEvent,
    StartEvent,
    StepEvent,
    ValidationEvent,
)

LOGGER = logging.getLogger(__name__)
SMOOTHING = 0.1
"""Weight of the newest step in the running mean behind the remaining time."""


class ConsoleProgress(Callback):
    """Losses and speed on the console while the run goes on, a summary at its end (rank 0).

    Args:
        mode: ``log.console``: auto (bar on a terminal, else lines) | bar | lines | none.
        log_every: steps between two lines; the bar moves at every step.
        metrics: gives the summary, and comes before this one in the list.
        stream: where to write; standard output by default.
    """

    def __init__(
        self,
        mode: str,
        log_every: int = 1,
        metrics: MetricsRecorder | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._stream, self.metrics = stream or sys.stdout, metrics
        if mode == "auto":
            mode = "bar" if self._stream.isatty() else "lines"
        self.mode = mode
        self._every = max(1, log_every)
        self._console = Console(file=self._stream, force_terminal=True if mode == "bar" else None)
        self._bar: Progress | None = None
        self._total = 0
        self._steps = 0
        self._seconds = 0.0

    def on_start(self, event: StartEvent) -> None:
        """Show the bar."""
        self._total = event.steps
        if self.mode != "bar":
            return
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task(
            "train", total=event.steps, completed=event.step, figures=""
        )
        self._bar.start()

    def on_step(self, event: StepEvent) -> None:
        """Show the step's figures and the remaining time."""
        step, seconds = event.step, event.record["step_seconds"]
        self._steps += 1
        # The first step warms caches and allocators up: the second replaces it.
        if self._steps <= 2:
            self._seconds = seconds
        else:
            self._seconds += SMOOTHING * (seconds - self._seconds)
        left = timedelta(seconds=round(self._seconds * (self._total - step)))
        figures = f"{step_figures(event.record)}  left {left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        if step % self._every == 0 or step == self._total:
            self.message(f"step {step}/{self._total}  {figures}", shown=self._bar is None)

    def on_validation(self, event: ValidationEvent) -> None:
        """Show the validation loss and, where known, the unigram entropy of the same tokens, which
        is what a model without context reaches (nats per token)."""
        text = f"step {event.step}  validation loss {event.record['valid_loss']:.4f}"
        if (entropy := event.record.get("unigram_entropy")) is not None:
            text += f"  (unigram entropy {entropy:.4f})"
        self.message(text)

    def message(self, text: str, shown: bool = True) -> None:
        """Log a line of text and, where ``shown``, print it; above the bar where there is one."""
        LOGGER.info(text, extra={"console": False})
        if shown and self.mode != "none":
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_end(self, event: EndEvent) -> None:
        """Close the bar and show the summary of a finished run."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        summary = self.metrics.summary if self.metrics else None
        if summary is not None and self.mode != "none":
            render_summary(summary, self._console)
            self._stream.flush()


def step_figures(record: Mapping[str, Any]) -> str:
    """The figures of a step on one line; those that its record lacks are left out."""
    figures = [f"loss {record['loss']:.4f}"]
    for name, label, form in (
        ("grad_norm", "grad", ".3f"),
        ("lr", "lr", ".2e"),
        ("tokens_per_second", "tokens/s", ",.0f"),
        ("mfu", "MFU", ".1%"),
        ("step_seconds", "s/step", ".2f"),
    ):
        value = record.get(name)
        if value is not None:
            figures.append(f"{label} {value:{form}}")
    if record.get("force_balance"):
        figures.append("[routing forced even]")
    return "  ".join(figures)
