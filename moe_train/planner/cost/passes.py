"""Seconds of a layer, of the embedding and of the head: a forward and a backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_train.config.hardware import HardwareConfig
from moe_train.planner.cost.calls import end_calls, ring_calls, sum_of, tensor_calls
from moe_train.planner.cost.communication import layer_traffic
from moe_train.planner.cost.compute import (
    Part,
    backward_seconds,
    dense_parts,
    embedding_parts,
    expert_parts,
    head_parts,
    mtp_parts,
    ring_steps,
    seconds,
)
from moe_train.planner.cost.constants import constants
from moe_train.planner.cost.launches import host_seconds
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
    """Exposed part, and what overlap takes from compute."""
    ring: Passes = Passes(0.0, 0.0)
    """Exposed part of the messages between parts of a sequence."""
    waiting: Passes = Passes(0.0, 0.0)
    """For the host, where its launches take longer than the kernels. Under ``placement=span``
    `experts` have that, and this is what overlapping exchanges take from compute."""

    def forward(self) -> float:
        """Seconds of a forward pass."""
        return sum(part.forward for part in self._parts)

    def backward(self, *, recomputed: bool) -> float:
        """Seconds of a backward pass; a recomputed layer runs forward once more."""
        return sum(part.backward for part in self._parts) + (self.forward() if recomputed else 0.0)

    @property
    def _parts(self) -> tuple[Passes, ...]:
        return (self.dense, self.experts, self.tensor, self.exchange, self.ring, self.waiting)


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
        exchange = overlapped(config.hardware, exchange, dense, experts, _steady(plan))
    tensor = Passes(traffic.tensor_forward.seconds, traffic.tensor_backward.seconds)
    layer = LayerTime(dense, experts, tensor, exchange, ring_time(plan))
    waiting = _waits(plan, layer, experts, stages)
    if not layout.span:
        return replace(layer, waiting=waiting)
    taken = [0.0, 0.0]
    if config.parallel.overlap_expert_comm:
        # Each slot of a tick computes while the other one's exchange takes multiprocessors.
        share = config.hardware.overlap_share
        computed = [sum(both) for both in zip(dense, experts, strict=True)]
        taken = [share * min(computed[i], exchange[1 - i]) for i in range(2)]
    return replace(layer, experts=_plus(experts, waiting), waiting=Passes(*taken))


def feed_forward_time(plan: Plan) -> LayerTime:
    """Times of a layer with a feed-forward network in the place of experts."""
    config, z = plan.config, plan.shapes.dense(plan.config.model.dense_hidden)
    calls = [one for one in tensor_calls(config, plan.layout, z) if one.part != "router"]
    ways = ("forward", "backward")
    tensor = Passes(*(sum_of(calls, way).seconds for way in ways))
    nothing = Passes(0.0, 0.0)
    dense = passes_of(dense_parts(config, z))
    layer = LayerTime(dense, nothing, tensor, nothing, ring_time(plan))
    return replace(layer, waiting=_waits(plan, layer, nothing, 0))


def _waits(plan: Plan, layer: LayerTime, experts: Passes, active: int) -> Passes:
    """Seconds in which a layer's kernels are done and the host has not launched the next ones."""
    in_chunk = max(len(plan.layout.stage_layers(0, 0)), 1)
    host = host_seconds(plan.config, plan.shapes, active, in_chunk)
    busy = zip(layer.dense, experts, layer.tensor, layer.exchange, layer.ring, strict=True)
    return Passes(*(max(0.0, one - sum(ran)) for one, ran in zip(host, busy, strict=True)))


def ring_time(plan: Plan) -> Passes:
    """What the steps of attention over parts of a sequence leave of the messages beside them."""
    config, z = plan.config, plan.shapes
    calls = ring_calls(config, plan.layout, z)
    if not calls:
        return Passes(0.0, 0.0)
    steps = ring_steps(config, dense_parts(config, z), z)
    beside = dict(zip(("ring", "ring back"), steps, strict=True))
    ahead = back = 0.0
    for call in calls:
        left = exposed_seconds(config.hardware, call.sent.seconds, beside[call.part])
        ahead, back = ahead + call.forward * left, back + call.backward * left
    return Passes(ahead, back)


def exposed_seconds(
    hardware: HardwareConfig, sent: float, beside: float, steady: float = 1.0
) -> float:
    """What compute of `beside` seconds leaves of communication of `sent`, and pays for hiding it.

    Args:
        steady: share of the step in which there is such compute.
    """
    share = hardware.overlap_share
    hidden = min(constants(hardware).hidden * sent, beside * (1.0 - share)) * steady
    return sent - hidden * (1.0 - share)


def _plus(one: Passes, other: Passes) -> Passes:
    return Passes(one.forward + other.forward, one.backward + other.backward)


def _steady(plan: Plan) -> float:
    """Share of Megatron's combined 1F1B in which two micro-batches' passes run side by side."""
    passes = plan.microbatches * plan.layout.virtual_pipeline
    return max(0.0, 1.0 - plan.schedule.in_flight(plan.pipeline, 0) / passes)


def overlapped(
    hardware: HardwareConfig, exchange: Passes, dense: Passes, experts: Passes, steady: float
) -> Passes:
    """What Megatron's combined 1F1B leaves of the exchange, and what it costs.

    Where it is steady a forward and a backward pass of different micro-batches hide each other's
    exchange; the first and the last ones have none beside them. While the exchange runs it takes
    multiprocessors from compute.

    Args:
        steady: share of the step in which it is.
    """
    if hardware.kind == "cpu":
        hidden = dense.forward + experts.forward
        return Passes(*(max(0.0, each - hidden) for each in exchange))
    whole = sum(exchange)
    left = exposed_seconds(hardware, whole, sum(dense) + sum(experts), steady)
    return Passes(*(each * left / whole for each in exchange)) if whole else exchange


def served_times(plan: Plan, layer: LayerTime, active: int) -> Passes:
    """A rank's experts while `active` of the stages send it their tokens (``placement=span``).

    With what it waits for the host, which launches every active stage's experts.
    """
    if not active:
        return Passes(0.0, 0.0)
    share = active / plan.layout.pipeline
    experts = passes_of(expert_parts(plan.config, plan.shapes, share, active))
    return _plus(experts, _waits(plan, layer, experts, active))


def end_times(plan: Plan) -> dict[str, Passes]:
    """Seconds of the ``embedding`` on the first stage and of the ``head`` on the last one.

    Multi-token prediction has a head of its own behind each of its layers, which join the hidden
    state with the next token's embedding.
    """
    config, z = plan.config, plan.shapes
    calls = end_calls(config, plan.layout, z)
    heads = 1 + config.model.mtp_layers
    times = {}
    for name, parts, count in (
        ("embedding", embedding_parts(config, z), 1),
        ("head", head_parts(config, z), heads),
    ):
        computed = passes_of(parts)
        times[name] = Passes(
            count * (computed.forward + sum_of(calls, "forward", name).seconds),
            count * (computed.backward + sum_of(calls, "backward", name).seconds),
        )
    joined = passes_of(mtp_parts(config, z))
    return {**times, "head": _plus(times["head"], joined)}
