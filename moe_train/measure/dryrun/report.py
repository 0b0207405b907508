"""The dry run's figures beside the planner's: as plain data, and as terminal tables."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from moe_train.measure.dryrun.rank import RankRun
    from moe_train.parallel.resolved import ResolvedRun
from moe_train.measure.dryrun.tracker import CATEGORIES
from moe_train.parallel.shapes import Assumptions
from moe_train.planner.memory.stages import StageMemory, stage_memory
from moe_train.planner.plan import Plan
from moe_train.planner.report.style import table_of, unit_of

VERSION = 1
"""Of the report's fields."""

MODULES = 12
"""Rows of the table by module."""


def planned(run: ResolvedRun, stage: int, imbalance: float) -> StageMemory:
    """The closed form under the dry run's conditions: the host's kernels, no allowances."""
    assumptions = Assumptions(imbalance=imbalance, fragmentation=0.0, fused=False)
    return stage_memory(Plan.of(run, assumptions), stage)


def difference(run: RankRun, plan: StageMemory) -> float:
    """Planned over run, less one."""
    return plan.allocated / run.peak.bytes - 1


def activation_difference(run: RankRun, plan: StageMemory) -> float:
    """The same without weights, gradients and optimizer state, which are equal anyway."""
    return plan.activations / (run.peak.bytes - run.state) - 1


def rank_report(run: RankRun, plan: StageMemory, recompute: str) -> dict[str, Any]:
    """One rank, JSON-ready; sizes in bytes, differences as fractions."""
    return {
        **dataclasses.asdict(run),
        "recompute": recompute,
        "planned": {
            "peak_bytes": plan.allocated,
            "weights": plan.state.weights,
            "gradients": plan.state.gradients,
            "optimizer": plan.state.optimizer,
            "activations": plan.activations,
            "moment": plan.peak.name,
            "held": plan.held,
        },
        "difference": difference(run, plan),
        "activation_difference": activation_difference(run, plan),
    }


def print_stages(rows: Sequence[tuple[str, RankRun, StageMemory]], console: Console) -> None:
    """One row a rank and recomputation: peak, closed form and moment; then what it is made of."""
    unit = unit_of(run.peak.bytes for _, run, _ in rows)
    peaks = table_of(
        f"Peak of tensors in one step, {unit.prefix}B",
        "recompute", "rank, stage", "peak", "planned", "difference", "update adds",
    )  # fmt: skip
    parts = table_of(
        f"The peak by category, {unit.prefix}B", "recompute", "rank, stage", *CATEGORIES
    )
    for recompute, run, plan in rows:
        place = f"{run.rank}, {run.stage}"
        peaks.add_row(
            recompute, place, unit.show(run.peak.bytes, 3), unit.show(plan.allocated, 3),
            f"{difference(run, plan):+.2%} ({activation_difference(run, plan):+.1%})",
            unit.show(run.update, 3),
        )  # fmt: skip
        sizes = run.peak.categories
        parts.add_row(recompute, place, *(unit.show(sizes[name], 3) for name in CATEGORIES))
    console.print(peaks)
    console.print("difference: closed form over dry run (in brackets: without state)")
    console.print("update adds: what gradient norm, clipping and update need beside what is live")
    for recompute, run, _ in rows:
        where = f"{run.peak.phase}, {run.peak.module or 'schedule'}"
        console.print(f"  peak of rank {run.rank}, recompute {recompute}: {where}", soft_wrap=True)
    console.print(parts)


def print_modules(run: RankRun, recompute: str, console: Console) -> None:
    """Which modules' tensors are alive at the peak, layers of a stage together."""
    unit = unit_of([run.peak.bytes])
    table = table_of(
        f"At the peak of rank {run.rank}, recompute {recompute}: by module, {unit.prefix}B",
        "module", "all layers", "largest layer",
    )  # fmt: skip
    whole, largest = Counter[str](), Counter[str]()
    for name, size in run.peak.modules.items():
        kind = name
        if name.startswith("layer "):
            kind = "layer " + name.partition(" ")[2].partition(" ")[2]
        kind = kind.strip() or "schedule (messages between stages)"
        whole[kind] += size
        largest[kind] = max(largest[kind], size)
    for kind, size in whole.most_common(MODULES):
        table.add_row(kind, unit.show(size, 3), unit.show(largest[kind], 3))
    console.print(table)
