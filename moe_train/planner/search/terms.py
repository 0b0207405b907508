"""A step's seconds by what they are spent on, and the term that separates two plans."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import NamedTuple

from moe_train.planner.cost.links import group
from moe_train.planner.cost.passes import Passes, end_times
from moe_train.planner.cost.pipeline import pipeline_time, stage_times
from moe_train.planner.cost.timing import StepTime
from moe_train.planner.plan import Plan

NAMES = {
    "dense": "attention and dense parts",
    "experts": "experts",
    "tensor": "tensor-parallel collectives",
    "exchange": "expert exchange",
    "ring": "context-parallel ring",
}
"""Terms of `LayerTime` by its fields."""
BUBBLE, ENDS, RECOMPUTED = "pipeline bubble", "embedding, head, messages", "recomputation"


def step_terms(plan: Plan, time: StepTime) -> dict[str, float]:
    """Seconds of a step by term, for the average stage; their sum is ``time.step``."""
    layer, layout = time.layer, plan.layout
    stages = stage_times(plan, layer)
    alone = pipeline_time(plan, layer, stages)
    terms = {BUBBLE: alone.bubble * alone.seconds}
    passes = plan.microbatches * layout.layers / layout.pipeline
    for name in (field.name for field in fields(layer)):
        value = getattr(layer, name)
        if isinstance(value, Passes):
            terms[NAMES.get(name, name)] = passes * sum(value)
    again = plan.microbatches * len(plan.config.recomputed_layers) / layout.pipeline
    if layout.span:
        # An exchange that other slots hide counts with what is left of it; a rank serves its
        # experts in every slot, whoever sends the rows.
        silent = replace(layer, exchange=Passes(0.0, 0.0))
        hidden = alone.seconds - pipeline_time(plan, silent, stages).seconds
        terms[NAMES["exchange"]] = hidden
        terms[RECOMPUTED] = again * (layer.dense.forward + layer.tensor.forward)
        ends = sum(sum(both) for both in end_times(plan).values())
        terms[ENDS] = plan.microbatches * ends / layout.pipeline
        rest = NAMES["experts"]
        terms[rest] = 0.0
    else:
        terms[RECOMPUTED] = again * layer.forward()
        rest = ENDS
    terms[rest] = alone.seconds - sum(terms.values())
    if time.pipeline > alone.seconds:
        terms["waiting for cores"] = time.pipeline - alone.seconds
    terms["gradients and weights of replicas"] = time.gradients
    terms["optimizer"] = time.optimizer
    return terms


def placed(plan: Plan, term: str) -> str:
    """`term` with the links that it uses, where it is an exchange of experts or a ring."""
    kinds = {NAMES["exchange"]: "ep", NAMES["ring"]: "cp"}
    if term not in kinds:
        return term
    ranks = group(plan.layout, plan.config.hardware, kinds[term])
    return f"{term} {'inside a node' if ranks.inside else 'between nodes'}"


class Separation(NamedTuple):
    """What makes a plan slower than another one, by the largest difference of a term."""

    seconds: float
    """Of the term; negative where the plan is the faster one."""
    term: str

    def __str__(self) -> str:
        return f"{self.seconds:+.3g} s {self.term}"


def separation(
    plan: Plan, terms: dict[str, float], other: Plan, others: dict[str, float]
) -> Separation:
    """The term that adds most to `plan` over `other`, or saves most where `plan` is faster."""
    names = [*dict.fromkeys((*terms, *others))]
    gaps = {name: terms.get(name, 0.0) - others.get(name, 0.0) for name in names}
    slower = sum(gaps.values()) >= 0
    name = (max if slower else min)(gaps, key=lambda one: gaps[one])
    return Separation(gaps[name], placed(plan if slower else other, name))
