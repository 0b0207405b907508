"""Console progress of a run: a bar on a terminal, plain lines elsewhere (``log.console``)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from moe_train.callbacks.recorders import MetricsRecorder
from moe_train.callbacks.summary import summary_rows
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
    """Losses and speed while the run goes on, a summary at its end (rank 0).

    Lines are log records, which the rank's log file gets in every mode; ``extra`` says whether the
    console shows them too.

    Args:
        mode: ``log.console``: auto (bar on a terminal, else lines) | bar | lines | none.
        log_every: steps between two lines; the bar moves at every step.
        metrics: gives the summary, and comes before this one in the list.
    """

    def __init__(self, mode: str, log_every: int, metrics: MetricsRecorder) -> None:
        self.mode = mode
        if mode == "auto":
            self.mode = "bar" if sys.stdout.isatty() else "lines"
        self._every, self._metrics = max(1, log_every), metrics
        self._bar: Progress | None = None
        self._steps, self._seconds = 0, 0.0

    def on_start(self, event: StartEvent) -> None:
        """Show the bar."""
        self._total = event.steps
        if self.mode == "bar":
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
                console=Console(force_terminal=True),
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
            shown = {"console": self.mode == "lines"}
            LOGGER.info("step %d/%d  %s", step, self._total, figures, extra=shown)

    def on_validation(self, event: ValidationEvent) -> None:
        """Show the validation loss and, where known, the unigram entropy of the same tokens, which
        is what a model without context reaches (nats per token)."""
        text = f"step {event.step}  validation loss {event.record['valid_loss']:.4f}"
        if (entropy := event.record.get("unigram_entropy")) is not None:
            text += f"  (unigram entropy {entropy:.4f})"
        # The bar stays below what the console prints.
        LOGGER.info(text, extra={"console": self.mode != "none"})

    def on_end(self, event: EndEvent) -> None:
        """Close the bar and show the summary of a finished run."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._metrics.summary is None:
            return
        rows = summary_rows(self._metrics.summary)
        width = max(len(label) for label, _ in rows)
        for label, value in rows:
            # On one line each, so that long folder names can be copied.
            LOGGER.info(f"{label:<{width}}  {value}", extra={"console": self.mode != "none"})


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
