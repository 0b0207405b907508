"""Step time of a plan: stages, pipeline, gradients, optimizer; and what follows per second.

Assumptions, all of which the report repeats: kernels of one device run one after the other;
tensor-parallel and expert collectives are exposed (expert ones are hidden behind compute only
with ``parallel.overlap_expert_comm``); gradient reduction hides behind one micro-batch's backward
pass where it overlaps; experts are as busy as `imbalance` says on every layer. Ranks that share
cores (`hardware.cores`) are never faster than all their work spread over the cores (Brent's bound,
"The parallel evaluation of general arithmetic expressions", 1974).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.layers import parse_layers
from moe_train.config.root import Config
from moe_train.plan.cost.communication import gradient_traffic, layer_traffic
from moe_train.plan.cost.compute import (
    dense_parts,
    expert_parts,
    head_parts,
    optimizer_seconds,
    peak_flops,
    seconds,
)
from moe_train.plan.cost.links import point_to_point
from moe_train.plan.layouts.batch import microbatches_per_step, sequences_per_step
from moe_train.plan.layouts.layout import Layout
from moe_train.plan.layouts.ticks import ticks
from moe_train.plan.memory.optimizer_bytes import bytes_per_parameter, state_bytes
from moe_train.plan.quantities.bubbles import bubble
from moe_train.plan.quantities.flops import flops_per_token, mfu
from moe_train.plan.quantities.parameters import rank_parameters
from moe_train.plan.quantities.shapes import Assumptions, Shapes, shapes


@dataclass(frozen=True)
class LayerTime:
    """One layer, one micro-batch, in seconds."""

    dense: float
    """Forward, without communication."""
    experts: float
    tensor_forward: float
    tensor_backward: float
    exchange: float
    """Exposed all-to-all of one direction."""

    def forward(self) -> float:
        """Seconds of a forward pass."""
        return self.dense + self.experts + self.tensor_forward + self.exchange

    def backward(self, *, recomputed: bool) -> float:
        """Seconds of a backward pass; a recomputed layer runs forward once more."""
        once = 2 * (self.dense + self.experts) + self.tensor_backward + self.exchange
        return once + (self.forward() if recomputed else 0.0)


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
    """Share of the pipeline's time in which a stage waits, by the schedule's formula."""
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
    dense = seconds(dense_parts(config, z))
    experts = seconds(expert_parts(config, z, layers=stages))
    traffic = layer_traffic(config, layout, z)
    exchange = traffic.expert_forward.seconds
    if config.parallel.overlap_expert_comm and not layout.span:
        exchange = max(0.0, exchange - dense - experts)
    return LayerTime(
        dense, experts, traffic.tensor_forward.seconds, traffic.tensor_backward.seconds, exchange
    )


def step_time(config: Config, layout: Layout, vocab: int, assumptions: Assumptions) -> StepTime:
    """Predicted time of one step of a legal plan."""
    z = shapes(config, layout, vocab, assumptions)
    layer = layer_time(config, layout, z)
    count = microbatches_per_step(config, layout.data)
    whole = frozenset(parse_layers(config.recompute.layers, config.model.layers))
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
    if cores := config.hardware.cores:
        work = _work(config, layout, z, stages, count)
        pipeline = max(pipeline, work / cores)
        turns = max(1.0, layout.world / cores)
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
        bubble=bubble(layout.pipeline, count, layout.virtual_pipeline),
        microbatches=count,
        sequences=sequences,
        tokens=tokens,
        mfu=mfu(tokens / total, flops, peak_flops(config) * layout.world),
    )


def _stage_time(
    config: Config, layout: Layout, z: Shapes, layer: LayerTime, stage: int, whole: frozenset[int]
) -> StageTime:
    layers = layout.stage_layers(stage)
    forward = len(layers) * layer.forward()
    backward = sum(layer.backward(recomputed=number in whole) for number in layers)
    if stage == layout.pipeline - 1:
        head = seconds(head_parts(config, z))
        forward, backward = forward + head, backward + 2 * head
    if layout.pipeline > 1:
        message = point_to_point(
            layout, config.hardware, min(stage, layout.pipeline - 2), z.N * z.H * z.b
        )
        forward += message.seconds * layout.virtual_pipeline
        backward += message.seconds * layout.virtual_pipeline
    return StageTime(stage, forward, backward)


def _work(
    config: Config, layout: Layout, z: Shapes, stages: tuple[StageTime, ...], count: int
) -> float:
    """Seconds that all ranks together compute and communicate in a step."""
    if not layout.span:
        return layout.world // layout.pipeline * count * sum(one.both for one in stages)
    layer, local = layer_time(config, layout, z), len(layout.stage_layers(0))
    whole = frozenset(parse_layers(config.recompute.layers, config.model.layers))
    dense = layer.dense + layer.tensor_forward
    own = 2 * layer.dense + layer.tensor_backward
    sources = sum(
        count * (dense * (2 if number in whole else 1) + own)
        for number in range(1, config.model.layers + 1)
    ) + 3 * count * seconds(head_parts(config, z))
    again = 1 if "moe" in config.recompute.modules else 0
    served = 0.0
    for tick in ticks(layout.pipeline, count):
        for half, passes in ((tick.forward, 1), (tick.backward, 2 + again)):
            active = len(half)
            experts = seconds(expert_parts(config, z, active / layout.pipeline, active))
            served += local * (passes * experts + layer.exchange) * bool(half)
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
    head = seconds(head_parts(config, z))
    message = point_to_point(layout, config.hardware, 0, z.N * z.H * z.b).seconds
    message = message if stages > 1 else 0.0
    served = [
        seconds(expert_parts(config, z, active / stages, active)) for active in range(stages + 1)
    ]
    again = [
        [layout.stage_layers(stage)[i] in whole for i in range(local)] for stage in range(stages)
    ]
    expert_again = "moe" in config.recompute.modules
    forward_dense = layer.dense + layer.tensor_forward
    overlap, spent = config.parallel.overlap_expert_comm, 0.0
    for tick in ticks(stages, count, delay=int(overlap)):
        forward = backward = 0.0
        if tick.forward:
            forward = local * (forward_dense + served[len(tick.forward)])
            forward += head * (stages - 1 in tick.forward)
        if tick.backward:
            rows = served[len(tick.backward)] * (3 if expert_again else 2)
            for i in range(local):
                repeat = any(again[stage][i] for stage in tick.backward)
                backward += 2 * layer.dense + layer.tensor_backward + rows
                backward += forward_dense if repeat else 0.0
            backward += 2 * head * (stages - 1 in tick.backward)
        spent += forward + backward
        for half, other in ((tick.forward, backward), (tick.backward, forward)):
            if half:
                hidden = other if overlap else 0.0
                spent += max(0.0, local * layer.exchange - hidden) + message
    return spent


def _update(
    config: Config, layout: Layout, vocab: int, stages: tuple[StageTime, ...]
) -> tuple[float, float]:
    """(exposed gradient and weight traffic, optimizer) of the slowest stage, in seconds."""
    each = bytes_per_parameter(config.dtype, config.optim)
    exposed = touched = 0.0
    for stage in {0, layout.pipeline - 1}:
        rank = stage * (layout.world // layout.pipeline)
        held = rank_parameters(config.model, layout, rank, vocab)
        traffic = gradient_traffic(config, layout, held)
        reduce = sum(sent.seconds for name, _, sent in traffic if "weights" not in name)
        gather = sum(sent.seconds for name, _, sent in traffic if "weights" in name)
        if config.parallel.overlap_grad_reduce and not layout.span:
            reduce = max(reduce - stages[stage].backward, reduce * 0.1)
        if config.parallel.overlap_param_gather:
            gather = max(gather - stages[stage].forward, gather * 0.1)
        exposed = max(exposed, reduce + gather)
        state = state_bytes(config, layout, held)
        owned = (state.optimizer + state.host) / max(each.state, 1)
        touched = max(touched, owned * (each.gradient + each.weight + 2 * each.state))
    return exposed, optimizer_seconds(config, touched)
