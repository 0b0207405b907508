"""``trace.json`` of a run: one step of every rank, in the format of ``moe-train schedule``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.planner.schedule.chrome import Event, process, trace_text
from moe_train.run_folder.files import write_atomically


@dataclass(frozen=True)
class RankTrace:
    """What one rank saw; seconds from a common zero, process numbers still to be given."""

    rank: int
    stage: int
    events: list[Event]


def merged(ranks: Sequence[RankTrace]) -> list[Event]:
    """All ranks' events, a process each, sorted by stage and rank."""
    found: list[Event] = []
    for one in sorted(ranks, key=lambda trace: (trace.stage, trace.rank)):
        name = f"rank {one.rank}, stage {one.stage} (measured)"
        found += process(one.rank, name, one.stage * 1000 + one.rank)
        found += [{**event, "pid": one.rank} for event in one.events]
    return found


def write_trace(path: Path, ranks: Sequence[RankTrace], facts: dict[str, Any]) -> None:
    """Write the trace of a step atomically; `facts` tell run, step and layout."""
    write_atomically(path, trace_text(merged(ranks), {**facts, "source": "measured"}))
