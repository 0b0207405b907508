"""The dry run on a terminal: per stage, by category, by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from moe_train.dryrun.rank import RankRun
from moe_train.dryrun.report import activation_difference, difference
from moe_train.dryrun.tracker import CATEGORIES
from moe_train.plan.memory.stages import GB, StageMemory

MODULES = 12


def print_stages(rows: Sequence[tuple[str, RankRun, StageMemory]], console: Console) -> None:
    """One row a rank and recomputation: peak, closed form and moment; then what it is made of."""
    peaks = Table(title="Peak of tensors, forward and backward of one step, GB (1e9 bytes)")
    parts = Table(title="The peak by category, GB")
    for table in (peaks, parts):
        table.add_column("recompute")
        table.add_column("rank, stage", justify="right")
    for name in ("peak", "planned", "difference"):
        peaks.add_column(name, justify="right")
    for name in CATEGORIES:
        parts.add_column(name, justify="right")
    for recompute, run, plan in rows:
        place = f"{run.rank}, {run.stage}"
        peaks.add_row(
            recompute, place, f"{run.peak.bytes / GB:.3f}", f"{plan.allocated / GB:.3f}",
            f"{difference(run, plan):+.2%} ({activation_difference(run, plan):+.1%})",
        )  # fmt: skip
        sizes = run.peak.categories
        parts.add_row(recompute, place, *(f"{sizes[name] / GB:.3f}" for name in CATEGORIES))
    console.print(peaks)
    console.print("difference: closed form over dry run (in brackets: without state)")
    for recompute, run, _ in rows:
        where = f"{run.peak.phase}, {run.peak.module or 'schedule'}"
        console.print(f"  peak of rank {run.rank}, recompute {recompute}: {where}", soft_wrap=True)
    console.print(parts)


def print_modules(run: RankRun, recompute: str, console: Console) -> None:
    """Which modules' tensors are alive at the peak, layers of a stage together."""
    table = Table(title=f"At the peak of rank {run.rank}, recompute {recompute}: by module, GB")
    for name, side in (("module", "left"), ("all layers", "right"), ("largest layer", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    whole, largest = Counter[str](), Counter[str]()
    for name, size in run.peak.modules.items():
        kind = name
        if name.startswith("layer "):
            kind = "layer " + name.partition(" ")[2].partition(" ")[2]
        kind = kind.strip() or "schedule (messages between stages)"
        whole[kind] += size
        largest[kind] = max(largest[kind], size)
    for kind, size in whole.most_common(MODULES):
        table.add_row(kind, f"{size / GB:.3f}", f"{largest[kind] / GB:.3f}")
    console.print(table)
