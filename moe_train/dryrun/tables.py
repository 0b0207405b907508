"""The dry run on a terminal: per stage, by category, by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from moe_train.dryrun.rank import RankRun
from moe_train.dryrun.report import activation_difference, difference
from moe_train.dryrun.tracker import CATEGORIES
from moe_train.plan.memory import GB, StageMemory

MODULES = 12


def print_stages(rows: Iterable[tuple[str, RankRun, StageMemory]], console: Console) -> None:
    """One row a rank and recomputation: peak by category, its moment, the closed form."""
    table = Table(title="Peak of tensors, forward and backward of one step, GB (1e9 bytes)")
    for name in ("recompute", "rank", "stage", "peak", *CATEGORIES, "planned", "difference"):
        left = name in ("recompute",)
        table.add_column(name, justify="left" if left else "right")
    table.add_column("moment")
    for recompute, run, plan in rows:
        peak = run.peak
        parts = [f"{peak.categories[name] / GB:.2f}" for name in CATEGORIES]
        table.add_row(
            recompute, str(run.rank), str(run.stage), f"{peak.bytes / GB:.2f}", *parts,
            f"{plan.allocated / GB:.2f}",
            f"{difference(run, plan):+.2%} ({activation_difference(run, plan):+.1%})",
            f"{peak.phase}, {peak.module}",
        )  # fmt: skip
    console.print(table)
    console.print("difference: planner's closed form over dry run (in brackets: activations only)")


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
