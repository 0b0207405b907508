"""`step_terms`: what a predicted step is spent on, averaged over the ranks."""

from __future__ import annotations

from dataclasses import fields

from moe_train.planner.cost.links import point_to_point
from moe_train.planner.cost.passes import end_times
from moe_train.planner.cost.pipeline import pipeline_time
from moe_train.planner.cost.timing import StepTime
from moe_train.planner.plan import Plan

LABELS = {
    "dense": "attention, norms and routers",
    "experts": "experts",
    "tensor": "tensor-parallel communication",
    "exchange": "expert exchange",
    "waiting": "kernel launches",
}
"""Name of each field of `moe_train.planner.cost.passes.LayerTime` in a report."""
ENDS, MESSAGES, BUBBLE = "embedding and head", "pipeline messages", "pipeline bubble"
GRADIENTS, OPTIMIZER = "gradient reduction", "optimizer"


def step_terms(plan: Plan, time: StepTime) -> dict[str, float]:
    """Seconds of a step by what they are spent on; they add up to the step.

    A rank's average over the stages. Under span the exchange is what the other terms leave. Ranks
    that share cores take the same terms, as many times longer as they queue.
    """
    layout, count = plan.layout, plan.microbatches
    pipeline = pipeline_time(plan, time.layer, time.stages)
    layers = plan.config.model.layers / layout.pipeline
    again = len(plan.config.recomputed_layers) / layout.pipeline
    terms = {}
    for one in fields(time.layer):
        forward, backward = getattr(time.layer, one.name)
        repeated = again
        if layout.span and one.name in ("experts", "exchange"):
            repeated = layers if "moe" in plan.config.recompute.modules else 0
            repeated = repeated if one.name == "experts" else 0
        terms[LABELS[one.name]] = count * (layers * (forward + backward) + repeated * forward)
    terms[ENDS] = count * sum(map(sum, end_times(plan).values())) / layout.pipeline
    terms[BUBBLE] = pipeline.bubble * pipeline.seconds
    rest, known = LABELS["exchange"] if layout.span else MESSAGES, sum(terms.values())
    if layout.span:
        known -= terms[rest]
        size = plan.shapes.N * plan.shapes.H * plan.shapes.b
        one_way = point_to_point(layout, plan.config.hardware, 0, size).seconds
        messages = 2 * count * one_way * (layout.pipeline - 1) / layout.pipeline
        terms[MESSAGES] = messages
        known += messages
    terms[rest] = max(pipeline.seconds - known, 0.0)
    longer = time.pipeline / pipeline.seconds if pipeline.seconds else 1.0
    terms = {name: longer * seconds for name, seconds in terms.items()}
    terms |= {GRADIENTS: time.gradients, OPTIMIZER: time.optimizer}
    return dict(sorted(terms.items(), key=lambda one: -one[1]))
