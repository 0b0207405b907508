"""Step time of a plan: stages, pipeline, gradients, optimizer; and what follows per second.

Assumptions, all of which the report repeats: kernels of one device run one after the other;
tensor-parallel and expert collectives are exposed (expert ones are hidden behind compute only
with ``parallel.overlap_expert_comm``); gradient reduction hides behind one micro-batch's backward
pass where it overlaps; experts are as busy as `imbalance` says on every layer. Ranks that are
more than the cores they share (`hardware.cores`) queue for them: see `sharing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_train.config.root import Config
from moe_train.features.schedules import bubble, span_bubble, ticks
from moe_train.parallel.batch import microbatches_per_step, sequences_per_step
from moe_train.parallel.flops import flops_per_token, mfu
from moe_train.parallel.layout import Layout
from moe_train.parallel.optimizer_state import owned_parameters
from moe_train.parallel.parameters import rank_parameters
from moe_train.parallel.shapes import Assumptions, Shapes, shapes
from moe_train.planner.cost.calls import end_calls, sum_of
from moe_train.planner.cost.communication import gradient_traffic, layer_traffic
from moe_train.planner.cost.compute import (
    Part,
    backward_seconds,
    dense_parts,
    embedding_parts,
    expert_parts,
    head_parts,
    optimizer_seconds,
    peak_flops,
    seconds,
)
from moe_train.planner.cost.links import point_to_point
from moe_train.planner.cost.sharing import BUNCHED, VARIATION, shared_seconds


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


@dataclass(frozen=True)
class StepTime:
    """A whole optimizer step."""

    layer: LayerTime
    stages: tuple[StageTime, ...]
    pipeline: float
    gradients: float
    """Exposed part of gradient reduction and weight gather."""
    optimizer: float
    bubble: float
    """Share of the pipeline's time in which a stage waits, by the formula for uniform stages."""
    microbatches: int
    sequences: int
    tokens: int
    mfu: float | None

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.pipeline + self.gradients + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.step

    @property
    def sequences_per_second(self) -> float:
        """Over all ranks."""
        return self.sequences / self.step


def layer_time(config: Config, layout: Layout, z: Shapes) -> LayerTime:
    """Times of one layer; under span, experts and exchange with all stages active."""
    stages = layout.pipeline if layout.span else 1
    dense = passes_of(dense_parts(config, z))
    experts = passes_of(expert_parts(config, z, layers=stages))
    traffic = layer_traffic(config, layout, z)
    exchange = Passes(traffic.expert_forward.seconds, traffic.expert_backward.seconds)
    if config.parallel.overlap_expert_comm and not layout.span:
        hidden = dense.forward + experts.forward
        exchange = Passes(*(max(0.0, each - hidden) for each in exchange))
    tensor = Passes(traffic.tensor_forward.seconds, traffic.tensor_backward.seconds)
    return LayerTime(dense, experts, tensor, exchange)


def passes_of(parts: list[Part]) -> Passes:
    """Parts that run one after the other."""
    return Passes(seconds(parts), backward_seconds(parts))


def end_times(config: Config, layout: Layout, z: Shapes) -> dict[str, Passes]:
    """Seconds of the ``embedding`` on the first stage and of the ``head`` on the last one."""
    calls = end_calls(config, layout, z)
    found = {}
    for name, parts in (
        ("embedding", embedding_parts(config, z)),
        ("head", head_parts(config, z)),
    ):
        computed = passes_of(parts)
        found[name] = Passes(
            computed.forward + sum_of(calls, "forward", name).seconds,
            computed.backward + sum_of(calls, "backward", name).seconds,
        )
    return found


def step_time(config: Config, layout: Layout, vocab: int, assumptions: Assumptions) -> StepTime:
    """Predicted time of one step of a legal plan."""
    z = shapes(config, layout, vocab, assumptions)
    layer = layer_time(config, layout, z)
    count = microbatches_per_step(config, layout.data)
    whole = config.recomputed_layers
    stages = tuple(
        _stage_time(config, layout, z, layer, stage, whole) for stage in range(layout.pipeline)
    )
    if layout.span:
        pipeline = _span_seconds(config, layout, z, layer, count, whole)
    else:
        # The slowest stage sets the pace; the others' passes fill and drain the pipeline,
        # in v times smaller pieces when interleaved.
        slowest = max(one.both for one in stages)
        fill = sum(one.both for one in stages) - slowest
        pipeline = count * slowest + fill / layout.virtual_pipeline
    gradients, optimizer = _update(config, layout, vocab, stages)
    if 0 < (cores := config.hardware.cores) < layout.world:
        work = _work(_busy(config), layout, z, count, whole)
        variation = BUNCHED if layout.span else VARIATION
        pipeline = shared_seconds(layout.world, cores, work / layout.world, pipeline, variation)
        turns = layout.world / cores
        gradients, optimizer = gradients * turns, optimizer * turns
    sequences = sequences_per_step(config, layout.data)
    tokens = sequences * config.data.sequence
    total = pipeline + gradients + optimizer
    flops = flops_per_token(config.model, config.data.sequence, vocab).total
    return StepTime(
        layer=layer,
        stages=stages,
        pipeline=pipeline,
        gradients=gradients,
        optimizer=optimizer,
        bubble=step_bubble(config, layout, z, layer, count),
        microbatches=count,
        sequences=sequences,
        tokens=tokens,
        mfu=mfu(
            tokens / total,
            flops,
            peak_flops(config) * processors(config, layout) * config.hardware.peak_known,
        ),
    )


def processors(config: Config, layout: Layout) -> int:
    """How many times the profile's peak there is: ranks of one thread share the cores."""
    return min(layout.world, config.hardware.cores or layout.world)


def step_bubble(
    config: Config, layout: Layout, z: Shapes, layer: LayerTime, microbatches: int
) -> float:
    """The bubble's closed form for the layout's own schedule, its stages taken as uniform.

    Where the halves of a spanning tick take turns, their exchange counts as hidden.
    """
    if not layout.span:
        return bubble(layout.pipeline, microbatches, layout.virtual_pipeline)
    dense = sum(layer.dense) + sum(layer.tensor)
    if config.recomputed_layers:
        dense += layer.dense.forward + layer.tensor.forward
    experts = sum(layer.experts)
    if "moe" in config.recompute.modules:
        experts += layer.experts.forward
    exchange = 0.0 if config.parallel.overlap_expert_comm else sum(layer.exchange)
    return span_bubble(layout.pipeline, microbatches, dense, experts, exchange)


def _stage_time(
    config: Config, layout: Layout, z: Shapes, layer: LayerTime, stage: int, whole: frozenset[int]
) -> StageTime:
    layers = layout.stage_layers(stage)
    forward = len(layers) * layer.forward()
    backward = sum(layer.backward(recomputed=number in whole) for number in layers)
    ends = end_times(config, layout, z)
    for name, place in (("embedding", 0), ("head", layout.pipeline - 1)):
        if stage == place:
            forward, backward = forward + ends[name].forward, backward + ends[name].backward
    if layout.pipeline > 1:
        message = point_to_point(
            layout, config.hardware, min(stage, layout.pipeline - 2), z.N * z.H * z.b
        )
        forward += message.seconds * layout.virtual_pipeline
        backward += message.seconds * layout.virtual_pipeline
    return StageTime(stage, forward, backward)


def _busy(config: Config) -> Config:
    """`config` on links whose time is what a collective keeps a core busy; none of it is hidden."""
    links, share = config.hardware, max(config.hardware.collective_work, 1e-9)
    links = replace(
        links,
        latency_us=links.latency_us * share,
        message_us=links.message_us * share,
        intra_node_gbps=links.intra_node_gbps / share,
        inter_node_gbps=links.inter_node_gbps / share,
    )
    parallel = replace(config.parallel, overlap_expert_comm=False)
    return replace(config, hardware=links, parallel=parallel)


def _work(config: Config, layout: Layout, z: Shapes, count: int, whole: frozenset[int]) -> float:
    """Seconds of a core that all ranks together take for a step's passes."""
    layer, local = layer_time(config, layout, z), len(layout.stage_layers(0))
    if not layout.span:
        each = [_stage_time(config, layout, z, layer, s, whole) for s in range(layout.pipeline)]
        return layout.ranks_per_stage * count * sum(one.both for one in each)
    dense = layer.dense.forward + layer.tensor.forward
    own = layer.dense.backward + layer.tensor.backward
    sources = sum(
        count * (dense * (2 if number in whole else 1) + own)
        for number in range(1, config.model.layers + 1)
    ) + count * sum(sum(end) for end in end_times(config, layout, z).values())
    again = 1 if "moe" in config.recompute.modules else 0
    served = 0.0
    for tick in ticks(layout.pipeline, count):
        for half, back in ((tick.forward, False), (tick.backward, True)):
            if half:
                active = len(half)
                experts = served_times(config, z, active, layout.pipeline)
                computed = experts.backward + again * experts.forward if back else experts.forward
                served += local * (computed + layer.exchange[back])
    replicas = layout.world // (layout.tensor * layout.pipeline)
    return replicas * layout.tensor * (sources + layout.pipeline * served)


def _span_seconds(
    config: Config, layout: Layout, z: Shapes, layer: LayerTime, count: int, whole: frozenset[int]
) -> float:
    """Sum over half-ticks; each waits for the slowest active stage at every local layer.

    With ``parallel.overlap_expert_comm`` the halves of a tick take turns: each one's exchange runs
    while the other computes, and only what is longer than that computing is waited for.
    """
    stages, local = layout.pipeline, len(layout.stage_layers(0))
    ends = end_times(config, layout, z)
    message = point_to_point(layout, config.hardware, 0, z.N * z.H * z.b).seconds
    message = message if stages > 1 else 0.0
    served = [served_times(config, z, active, stages) for active in range(stages + 1)]
    again = [
        [layout.stage_layers(stage)[i] in whole for i in range(local)] for stage in range(stages)
    ]
    expert_again = "moe" in config.recompute.modules
    forward_dense = layer.dense.forward + layer.tensor.forward
    overlap, spent = config.parallel.overlap_expert_comm, 0.0
    for tick in ticks(stages, count, delay=int(overlap)):
        forward = backward = 0.0
        if tick.forward:
            forward = local * (forward_dense + served[len(tick.forward)].forward)
            # Both ends are in the same half; the slower one sets the pace.
            forward += _slower(ends, tick.forward, stages).forward
        if tick.backward:
            experts = served[len(tick.backward)]
            rows = experts.backward + (experts.forward if expert_again else 0.0)
            for i in range(local):
                repeat = any(again[stage][i] for stage in tick.backward)
                backward += layer.dense.backward + layer.tensor.backward + rows
                backward += forward_dense if repeat else 0.0
            backward += _slower(ends, tick.backward, stages).backward
        spent += forward + backward
        for half, other, exchange in (
            (tick.forward, backward, layer.exchange.forward),
            (tick.backward, forward, layer.exchange.backward),
        ):
            if half:
                hidden = other if overlap else 0.0
                spent += max(0.0, local * exchange - hidden) + message
    return spent


def served_times(config: Config, z: Shapes, active: int, stages: int) -> Passes:
    """A rank's experts while `active` of the stages send it their tokens."""
    if not active:
        return Passes(0.0, 0.0)
    return passes_of(expert_parts(config, z, active / stages, active))


def _slower(ends: dict[str, Passes], half: Mapping[int, int], stages: int) -> Passes:
    here = [ends["embedding"]] if 0 in half else []
    here += [ends["head"]] if stages - 1 in half else []
    if len(here) == 2 and stages == 1:
        return Passes(*(sum(both) for both in zip(*here, strict=True)))
    return Passes(*(max(both) for both in zip(*here, Passes(0.0, 0.0), strict=True)))


def _update(
    config: Config, layout: Layout, vocab: int, stages: tuple[StageTime, ...]
) -> tuple[float, float]:
    """(exposed gradient and weight traffic, optimizer) of the slowest stage, in seconds."""
    # On the host a collective takes a core's time, and hides where there is one to spare.
    busy = 0 < config.hardware.cores <= layout.world
    exposed = slowest = 0.0
    for stage in {0, layout.pipeline - 1}:
        rank = layout.stage_ranks(stage)[0]
        held = rank_parameters(config.model, layout, rank, vocab)
        traffic = gradient_traffic(config, layout, held)
        reduce = sum(sent.seconds for name, _, sent in traffic if "weights" not in name)
        gather = sum(sent.seconds for name, _, sent in traffic if "weights" in name)
        if config.parallel.overlap_grad_reduce and not layout.span and not busy:
            reduce = max(reduce - stages[stage].backward, reduce * 0.1)
        if config.parallel.overlap_param_gather and not busy:
            gather = max(gather - stages[stage].forward, gather * 0.1)
        exposed = max(exposed, reduce + gather)
        owned = owned_parameters(config, layout, held)
        slowest = max(slowest, optimizer_seconds(config, held.total, owned))
    return exposed, slowest
