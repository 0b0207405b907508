"""Seconds of a pipelined step's passes, and its bubble: 1F1B, interleaved 1F1B, spanning 1F1B."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_train.config.hardware import HardwareConfig
from moe_train.features.schedules import ticks
from moe_train.planner.cost.links import point_to_point
from moe_train.planner.cost.passes import (
    LayerTime,
    Passes,
    end_times,
    exposed_seconds,
    feed_forward_time,
    layer_time,
    served_times,
)
from moe_train.planner.plan import Plan


class PipelineTime(NamedTuple):
    """The passes of a step, each rank on a device of its own."""

    seconds: float
    """From the first forward to the last backward pass."""
    bubble: float
    """Share of these seconds in which a stage waits for others, averaged over the stages.

    Of uniform stages it is (P - 1) / (v M + P - 1); uneven ones (the head, layers that are not
    recomputed) add to it. Under span a rank that serves its experts, or takes part in an exchange,
    does not wait.
    """


@dataclass(frozen=True)
class StageTime:
    """One stage, one micro-batch, in seconds, without waiting."""

    stage: int
    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def stage_times(plan: Plan, layer: LayerTime) -> tuple[StageTime, ...]:
    """Every stage with the messages that it sends."""
    layout, z, whole = plan.layout, plan.shapes, plan.config.recomputed_layers
    ends, times = end_times(plan), []
    first = plan.config.model.dense_layers
    kinds = [_both_ways(one) for one in (layer, feed_forward_time(plan) if first else layer)]
    for stage in range(layout.pipeline):
        forward = backward = 0.0
        for number in layout.stage_layers(stage):
            ahead, back, repeated = kinds[number <= first]
            forward += ahead
            backward += repeated if number in whole else back
        for name, place in (("embedding", 0), ("head", layout.pipeline - 1)):
            if stage == place:
                forward, backward = forward + ends[name].forward, backward + ends[name].backward
        if layout.pipeline > 1:
            link = min(stage, layout.pipeline - 2)
            message = point_to_point(layout, plan.config.hardware, link, z.N * z.H * z.b)
            exposed = (
                message.seconds
                * layout.virtual_pipeline
                * exposed_messages(plan.config.hardware, layout.virtual_pipeline)
            )
            forward, backward = forward + exposed, backward + exposed
        times.append(StageTime(stage, forward, backward))
    return tuple(times)


def _both_ways(layer: LayerTime) -> tuple[float, float, float]:
    """Seconds forward, backward, and backward with recomputation."""
    back, repeated = (layer.backward(recomputed=again) for again in (False, True))
    return layer.forward(), back, repeated


def exposed_messages(hardware: HardwareConfig, chunks: int) -> float:
    """Share of the messages between stages of `chunks` model chunks that is waited for.

    Megatron overlaps them with the passes of other chunks when interleaving (overlap_p2p_comm); on
    a CPU they take a core's time.
    """
    if chunks == 1 or hardware.kind == "cpu":
        return 1.0
    return exposed_seconds(hardware, 1.0, math.inf)


def pipeline_time(plan: Plan, layer: LayerTime, stages: tuple[StageTime, ...]) -> PipelineTime:
    """Seconds and bubble of a step's passes.

    The slowest stage sets the pace; the others' passes fill and drain the pipeline, in v times
    smaller pieces when interleaved.
    """
    if plan.layout.span:
        return _span_time(plan, layer)
    slowest = max(one.both for one in stages)
    every = sum(one.both for one in stages)
    seconds = plan.microbatches * slowest + (every - slowest) / plan.layout.virtual_pipeline
    return PipelineTime(seconds, 1 - plan.microbatches * every / (len(stages) * seconds))


def _span_time(plan: Plan, layer: LayerTime) -> PipelineTime:
    """Sum over slots; each waits for the slowest active stage at every local layer.

    With ``parallel.overlap_expert_comm`` the slots of a tick overlap: each one's exchange runs
    while the other computes, and only what is longer than that computing is waited for.
    """
    config, layout, z = plan.config, plan.layout, plan.shapes
    whole, stages, local = config.recomputed_layers, layout.pipeline, len(layout.stage_layers(0))
    ends = end_times(plan)
    message = point_to_point(layout, config.hardware, 0, z.N * z.H * z.b).seconds
    message = message if stages > 1 else 0.0
    served = [served_times(plan, layer, active) for active in range(stages + 1)]
    again = [
        [layout.stage_layers(stage)[i] in whole for i in range(local)] for stage in range(stages)
    ]
    expert_again = "moe" in config.recompute.modules
    forward_dense = layer.dense.forward + layer.tensor.forward + layer.waiting.forward
    backward_dense = layer.dense.backward + layer.tensor.backward + layer.waiting.backward
    overlap, spent, shared = config.parallel.overlap_expert_comm, 0.0, 0.0
    for tick in ticks(stages, plan.microbatches, delay=int(overlap)):
        forward = backward = 0.0
        if tick.forward:
            forward = local * (forward_dense + served[len(tick.forward)].forward)
            shared += local * served[len(tick.forward)].forward
            # Both ends are in the same slot; the slower one sets the pace.
            forward += _slower(ends, tick.forward, stages).forward
        if tick.backward:
            experts = served[len(tick.backward)]
            rows = experts.backward + (experts.forward if expert_again else 0.0)
            shared += local * rows
            for i in range(local):
                repeat = any(again[stage][i] for stage in tick.backward)
                backward += backward_dense + rows
                backward += forward_dense if repeat else 0.0
            backward += _slower(ends, tick.backward, stages).backward
        spent += forward + backward
        for slot, other, exchange in (
            (tick.forward, backward, layer.exchange.forward),
            (tick.backward, forward, layer.exchange.backward),
        ):
            if slot:
                exposed = max(0.0, local * exchange - (other if overlap else 0.0))
                spent, shared = spent + exposed + message, shared + exposed
    layers = forward_dense + backward_dense
    own = stages * local * layers + forward_dense * sum(map(sum, again))
    own += sum(map(sum, ends.values())) + 2 * (stages - 1) * message
    # Every rank takes part in what is shared; for the rest a stage waits unless it is its own.
    idle = stages * (spent - shared) - plan.microbatches * own
    return PipelineTime(spent, idle / (stages * spent))


def _slower(ends: dict[str, Passes], slot: Mapping[int, int], stages: int) -> Passes:
    here = [ends["embedding"]] if 0 in slot else []
    here += [ends["head"]] if stages - 1 in slot else []
    if len(here) == 2 and stages == 1:
        return Passes(*(sum(both) for both in zip(*here, strict=True)))
    return Passes(*(max(both) for both in zip(*here, Passes(0.0, 0.0), strict=True)))


def core_seconds(plan: Plan) -> float:
    """Seconds of a core that all ranks together take for a step's passes.

    Links count with the share of a collective's time in which it occupies a core; none is hidden.
    """
    links = plan.config.hardware
    share = max(links.collective_work, 1e-9)
    links = replace(
        links,
        latency_us=links.latency_us * share,
        message_us=links.message_us * share,
        intra_node_gbps=links.intra_node_gbps / share,
        inter_node_gbps=links.inter_node_gbps / share,
    )
    parallel = replace(plan.config.parallel, overlap_expert_comm=False)
    plan = plan.under(replace(plan.config, hardware=links, parallel=parallel))
    config, layout, count = plan.config, plan.layout, plan.microbatches
    layer, local = layer_time(plan), len(layout.stage_layers(0))
    if not layout.span:
        return layout.ranks_per_stage * count * sum(one.both for one in stage_times(plan, layer))
    dense = layer.dense.forward + layer.tensor.forward
    own = layer.dense.backward + layer.tensor.backward
    whole = config.recomputed_layers
    sources = sum(
        count * (dense * (2 if number in whole else 1) + own)
        for number in range(1, config.model.layers + 1)
    ) + count * sum(sum(end) for end in end_times(plan).values())
    again = 1 if "moe" in config.recompute.modules else 0
    served = 0.0
    for tick in ticks(layout.pipeline, count):
        for slot, back in ((tick.forward, False), (tick.backward, True)):
            if slot:
                experts = served_times(plan, layer, len(slot))
                computed = experts.backward + again * experts.forward if back else experts.forward
                served += local * (computed + layer.exchange[back])
    replicas = layout.world // (layout.tensor * layout.pipeline)
    return replicas * layout.tensor * (sources + layout.pipeline * served)
