"""The dry run's figures beside the planner's, as plain data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_train.measure.dryrun.rank import RankRun
    from moe_train.parallel.resolved import ResolvedRun
from moe_train.parallel.shapes import Assumptions
from moe_train.planner.memory.stages import StageMemory, stage_memory
from moe_train.planner.plan import Plan

VERSION = 1
"""Of the report's fields."""

ALLOWED = 0.05
"""Difference between closed form and dry run that the planner promises to stay below."""


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
