"""The summary of a run: losses, speed, wall time and run folder."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunSummary:
    """Figures of a whole run, those before a resume included. None: not measured.

    Attributes:
        state: finished | preempted | failed.
        step: optimizer steps completed.
        first_loss, last_loss: training loss, nats per token.
        valid_loss: last validation loss, nats per token.
        unigram_entropy: of the validation tokens, nats per token: what a model without context
            reaches; below it the model uses context.
        tokens_per_second, mfu: medians over the steps, the first left out as warm-up.
        wall_seconds: of this process, start-up included.
        run_folder: its path.
    """

    state: str
    step: int
    first_loss: float | None
    last_loss: float | None
    valid_loss: float | None
    unigram_entropy: float | None
    tokens_per_second: float | None
    mfu: float | None
    wall_seconds: float
    run_folder: Path


def summarise(
    records: Iterable[Mapping[str, Any]],
    *,
    state: str,
    wall_seconds: float,
    run_folder: Path,
) -> RunSummary:
    """Build the summary from the records of metrics.jsonl, in order."""
    records = list(records)
    train = [record for record in records if "loss" in record]
    valid = [record for record in records if "valid_loss" in record]
    return RunSummary(
        state=state,
        step=train[-1]["step"] if train else 0,
        first_loss=train[0]["loss"] if train else None,
        last_loss=train[-1]["loss"] if train else None,
        valid_loss=valid[-1]["valid_loss"] if valid else None,
        unigram_entropy=valid[-1].get("unigram_entropy") if valid else None,
        tokens_per_second=_median(train, "tokens_per_second"),
        mfu=_median(train, "mfu"),
        wall_seconds=wall_seconds,
        run_folder=run_folder,
    )


def summary_rows(summary: RunSummary) -> list[tuple[str, str]]:
    """The summary as (label, text); figures that were not measured are left out."""
    rows = [("run", f"{summary.state} after {summary.step} steps")]
    if summary.first_loss is not None and summary.last_loss is not None:
        rows.append(("training loss", f"{summary.first_loss:.4f} -> {summary.last_loss:.4f}"))
    if summary.valid_loss is not None:
        text = f"{summary.valid_loss:.4f}"
        if summary.unigram_entropy is not None:
            side = "below" if summary.valid_loss < summary.unigram_entropy else "not below"
            text += f", {side} the unigram entropy {summary.unigram_entropy:.4f}"
        rows.append(("validation loss", text))
    if summary.tokens_per_second is not None:
        rows.append(("tokens/s", f"{summary.tokens_per_second:,.0f}"))
    if summary.mfu is not None:
        rows.append(("MFU", f"{summary.mfu:.1%}"))
    rows.append(("wall time", str(timedelta(seconds=round(summary.wall_seconds)))))
    rows.append(("run folder", str(summary.run_folder)))
    return rows


def _median(records: list[Mapping[str, Any]], field: str) -> float | None:
    values = [r[field] for r in records if r.get(field) is not None]
    return statistics.median(values[1:] or values) if values else None
