"""What the console shows while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from moe_train.callbacks.summary import RunSummary, render_summary

SMOOTHING = 0.1
"""Weight of the newest step in the running mean behind the remaining time."""


class ConsoleProgress:
    """The console of rank 0; other ranks have none.

    Args:
        mode: ``log.console``: auto (bar on a terminal, else lines) | bar | lines | none.
        log_every: steps between two lines; the bar moves at every step.
        stream: where to write; standard output by default.
    """

    def __init__(self, mode: str, log_every: int = 1, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        if mode == "auto":
            mode = "bar" if self._stream.isatty() else "lines"
        self.mode = mode
        self._every = max(1, log_every)
        self._console = Console(file=self._stream, force_terminal=True if mode == "bar" else None)
        self._bar: Progress | None = None
        self._total = 0
        self._steps = 0
        self._seconds = 0.0

    def start(self, total: int, done: int = 0) -> None:
        """Begin: `total` optimizer steps, of which `done` were made before a resume."""
        self._total = total
        if self.mode != "bar":
            return
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task("train", total=total, completed=done, facts="")
        self._bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a training record (fields of metrics.jsonl)."""
        seconds = record.get("step_seconds")
        if seconds is not None:
            self._steps += 1
            # The first step warms caches and allocators up: the second replaces it.
            if self._steps <= 2:
                self._seconds = seconds
            else:
                self._seconds += SMOOTHING * (seconds - self._seconds)
        done = record["step"]
        facts = step_facts(record)
        if self._steps:
            left = timedelta(seconds=round(self._seconds * (self._total - done)))
            facts += f"  left {left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, facts=facts)
        elif done % self._every == 0 or done == self._total:
            self._line(f"step {done}/{self._total}  {facts}")

    def validation(self, record: Mapping[str, Any]) -> None:
        """Show a validation record: ``step``, ``valid_loss`` and, where known, the unigram entropy
        of the same tokens, which is what a model without context reaches (nats per token)."""
        text = f"step {record['step']}  validation loss {record['valid_loss']:.4f}"
        entropy = record.get("unigram_entropy")
        if entropy is not None:
            text += f"  (unigram entropy {entropy:.4f})"
        self.message(text)

    def message(self, text: str) -> None:
        """Show a line of text; above the bar where there is one."""
        if self.mode == "bar":
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._line(text)

    def finish(self, summary: RunSummary | None = None) -> None:
        """Close the bar and show the summary; safe to call twice and after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if summary is not None and self.mode != "none":
            render_summary(summary, self._console)
            self._stream.flush()

    def _line(self, text: str) -> None:
        if self.mode != "none":
            print(text, file=self._stream, flush=True)


def step_facts(record: Mapping[str, Any]) -> str:
    """The facts of a training record on one line; those that it lacks are left out."""
    facts = [f"loss {record['loss']:.4f}"]
    for name, label, form in (
        ("grad_norm", "grad", ".3f"),
        ("lr", "lr", ".2e"),
        ("tokens_per_second", "tokens/s", ",.0f"),
        ("mfu", "MFU", ".1%"),
        ("step_seconds", "s/step", ".2f"),
    ):
        value = record.get(name)
        if value is not None:
            facts.append(f"{label} {value:{form}}")
    if record.get("force_balance"):
        facts.append("[routing forced even]")
    return "  ".join(facts)
