"""Whether another layout beats a plan: the entry ``better`` of its report."""

from __future__ import annotations

from typing import Any

from moe_train.planner.plan import Plan
from moe_train.planner.search import better_than

EFFORT = 150
"""Step times that a plan computes for it: a plan answers in about a second."""
MOST = 64
"""Ranks beyond which listing the layouts alone takes longer than that."""


def better_report(plan: Plan) -> dict[str, Any]:
    """The best of the layouts that a short search meets, if it beats `plan` by more than the band.

    Tokens a step are the plan's. ``overrides``, to be added to the plan's own, are empty where it
    meets none; ``moe-train tune`` searches everything.
    """
    world = plan.layout.world
    result: dict[str, Any] = {"searched": world <= MOST, "world": world, "overrides": []}
    if result["searched"] and (better := better_than(plan, effort=EFFORT)):
        result["layout"] = better.layout.tag
        result["overrides"] = better.overrides(plan.config)
        result["step_seconds"] = better.seconds
        result["total_bytes"] = better.bytes
    return result
