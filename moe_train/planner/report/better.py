"""Whether another layout beats a plan: the entry ``better`` of its report."""

from __future__ import annotations

from typing import Any

from moe_train.planner.plan import Plan
from moe_train.planner.search import Candidate, better_than

EFFORT = 300
"""Step times that a plan computes for it: a plan answers in about a second."""
MOST = 64
"""Ranks beyond which listing the layouts alone takes longer than that."""


def short_search(plan: Plan) -> dict[str, Any]:
    """The best of the layouts that a short search meets, if it beats `plan` by more than the band.

    ``moe-train tune`` searches everything.
    """
    if plan.layout.world > MOST:
        return {**better_report(plan, None), "searched": False}
    return better_report(plan, better_than(plan, effort=EFFORT))


def better_report(plan: Plan, better: Candidate | None) -> dict[str, Any]:
    """A better layout for the tokens of the plan's step, as plain data.

    ``overrides``, to be added to the plan's own, are empty where there is none.
    """
    result: dict[str, Any] = {"searched": True, "world": plan.layout.world, "overrides": []}
    if better:
        result["layout"] = better.layout.tag
        result["overrides"] = better.overrides(plan.config)
        result["step_seconds"] = better.seconds
        result["total_bytes"] = better.bytes
    return result
