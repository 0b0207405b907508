"""Seconds of a layer, of the embedding and of the head: a forward and a backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moe_train.planner.cost.calls import end_calls, sum_of
from moe_train.planner.cost.communication import layer_traffic
from moe_train.planner.cost.compute import (
    Part,
    backward_seconds,
    dense_parts,
    embedding_parts,
    expert_parts,
    head_parts,
    seconds,
)
from moe_train.planner.plan import Plan


class Passes(NamedTuple):
    """Seconds of a forward and of a backward pass."""

    forward: float
    backward: float


@dataclass(frozen=True)
class LayerTime:
    """One layer, one micro-batch, in seconds."""

    dense: Passes
    """Without communication."""
    experts: Passes
    tensor: Passes
    exchange: Passes
    """Exposed part."""

    def forward(self) -> float:
        """Seconds of a forward pass."""
        parts = (self.dense, self.experts, self.tensor, self.exchange)
        return sum(part.forward for part in parts)

    def backward(self, *, recomputed: bool) -> float:
        """Seconds of a backward pass; a recomputed layer runs forward once more."""
        parts = (self.dense, self.experts, self.tensor, self.exchange)
        return sum(part.backward for part in parts) + (self.forward() if recomputed else 0.0)


def passes_of(parts: list[Part]) -> Passes:
    """Parts that run one after the other."""
    return Passes(seconds(parts), backward_seconds(parts))


def layer_time(plan: Plan) -> LayerTime:
    """Times of one layer; under span, experts and exchange with all stages active."""
    config, layout, z = plan.config, plan.layout, plan.shapes
    stages = layout.pipeline // layout.expert_stages
    dense = passes_of(dense_parts(config, z))
    experts = passes_of(expert_parts(config, z, layers=stages))
    traffic = layer_traffic(config, layout, z)
    exchange = Passes(traffic.expert_forward.seconds, traffic.expert_backward.seconds)
    if config.parallel.overlap_expert_comm and not layout.span:
        hidden = dense.forward + experts.forward
        exchange = Passes(*(max(0.0, each - hidden) for each in exchange))
    tensor = Passes(traffic.tensor_forward.seconds, traffic.tensor_backward.seconds)
    return LayerTime(dense, experts, tensor, exchange)


def served_times(plan: Plan, active: int) -> Passes:
    """A rank's experts while `active` of the stages send it their tokens (``placement=span``)."""
    if not active:
        return Passes(0.0, 0.0)
    share = active / plan.layout.pipeline
    return passes_of(expert_parts(plan.config, plan.shapes, share, active))


def end_times(plan: Plan) -> dict[str, Passes]:
    """Seconds of the ``embedding`` on the first stage and of the ``head`` on the last one."""
    config, z = plan.config, plan.shapes
    calls = end_calls(config, plan.layout, z)
    times = {}
    for name, parts in (
        ("embedding", embedding_parts(config, z)),
        ("head", head_parts(config, z)),
    ):
        computed = passes_of(parts)
        times[name] = Passes(
            computed.forward + sum_of(calls, "forward", name).seconds,
            computed.backward + sum_of(calls, "backward", name).seconds,
        )
    return times
