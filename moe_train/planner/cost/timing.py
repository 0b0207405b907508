"""Step time of a plan: pipeline, gradient reduction, optimizer; tokens per second and MFU.

Assumptions, which the report repeats: kernels of one device run one after the other;
tensor-parallel and expert collectives are exposed (expert ones are hidden behind compute only
with ``parallel.overlap_expert_comm``); gradient reduction hides behind one micro-batch's backward
pass where it overlaps; experts are as busy as `imbalance` says on every layer. Ranks that outnumber
the cores they share (`hardware.cores`) queue for them: see `sharing`.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.parallel.flops import flops_per_token, mfu
from moe_train.parallel.optimizer_state import owned_parameters
from moe_train.planner.cost.communication import LEAST_EXPOSED, gradient_traffic
from moe_train.planner.cost.compute import optimizer_seconds, peak_flops
from moe_train.planner.cost.passes import LayerTime, Passes, layer_time
from moe_train.planner.cost.pipeline import (
    StageTime,
    core_seconds,
    pipeline_time,
    stage_times,
)
from moe_train.planner.cost.sharing import BUNCHED, VARIATION, shared_seconds
from moe_train.planner.plan import Plan


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
    """See `moe_train.planner.cost.pipeline.PipelineTime`."""
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


def step_time(plan: Plan) -> StepTime:
    """Predicted time of one step of a legal plan."""
    config, layout = plan.config, plan.layout
    layer = layer_time(plan)
    stages = stage_times(plan, layer)
    pipeline, bubble = pipeline_time(plan, layer, stages)
    gradients, optimizer = _update(plan, stages, layer)
    if 0 < (cores := config.hardware.cores) < layout.world:
        busy = core_seconds(plan) / layout.world
        variation = BUNCHED if layout.span else VARIATION
        pipeline = shared_seconds(layout.world, cores, busy, pipeline, variation)
        turns = layout.world / cores
        gradients, optimizer = gradients * turns, optimizer * turns
    total = pipeline + gradients + optimizer
    flops = flops_per_token(config.model, config.data.sequence, plan.vocab).total
    # Ranks that share cores share their peak.
    devices = min(layout.world, config.hardware.cores or layout.world)
    peak = peak_flops(config) * devices * config.hardware.peak_known
    return StepTime(
        layer=layer,
        stages=stages,
        pipeline=pipeline,
        gradients=gradients,
        optimizer=optimizer,
        bubble=bubble,
        microbatches=plan.microbatches,
        sequences=plan.sequences,
        tokens=plan.tokens,
        mfu=mfu(plan.tokens / total, flops, peak),
    )


def _update(plan: Plan, stages: tuple[StageTime, ...], layer: LayerTime) -> tuple[float, float]:
    """(exposed gradient and weight traffic, optimizer) of the slowest stage, in seconds."""
    config, layout = plan.config, plan.layout
    # On a CPU a collective takes a core's time, and hides where there is one to spare.
    busy = 0 < config.hardware.cores <= layout.world
    exposed = slowest = 0.0
    # The links that an exchange keeps busy are not free for gradients.
    layers = len(layout.stage_layers(0))
    exchange = Passes(*(layers * each for each in layer.exchange))
    for stage in {0, layout.pipeline - 1}:
        held = plan.parameters(stage)
        traffic = gradient_traffic(config, layout, held)
        reduce = sum(sent.seconds for name, _, sent in traffic if "weights" not in name)
        gather = sum(sent.seconds for name, _, sent in traffic if "weights" in name)
        if config.parallel.overlap_grad_reduce and not layout.span and not busy:
            reduce = max(
                reduce - (stages[stage].backward - exchange.backward), reduce * LEAST_EXPOSED
            )
        if config.parallel.overlap_param_gather and not busy:
            gather = max(
                gather - (stages[stage].forward - exchange.forward), gather * LEAST_EXPOSED
            )
        exposed = max(exposed, reduce + gather)
        owned = owned_parameters(config, layout, held)
        slowest = max(slowest, optimizer_seconds(config, held.total, owned))
    return exposed, slowest
