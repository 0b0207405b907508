"""`QUANTITIES`: every number that a claim can name, with its unit and its function of a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moe_train.features.schedules import bubble
from moe_train.parallel.optimizer_state import variants
from moe_train.parallel.sizes import is_legal
from moe_train.planner.claims import comparisons as compare
from moe_train.planner.cost.links import group
from moe_train.planner.estimate import GB, Estimate
from moe_train.planner.memory.stages import StageMemory
from moe_train.planner.plan import BAND


@dataclass(frozen=True)
class Quantity:
    """A number of a plan: unit, meaning and function."""

    unit: str
    meaning: str
    compute: Callable[[Estimate], float | None]
    """None where a plan leaves nothing to compare."""
    detail: Callable[[Estimate], str] | None = None
    """The part of the plan that the number refers to (a layout's overrides, for example)."""
    band: str = ""
    """How the error of predicted times enters: ``relative``, ``difference`` (of a share of a step),
    or not at all."""
    searches: bool = False
    """Whether it takes a search of layouts, seconds instead of milliseconds."""

    def describe(self, plan: Estimate) -> str:
        """The meaning, with the detail in parentheses."""
        detail = self.detail(plan) if self.detail else ""
        return f"{self.meaning} ({detail})" if detail else self.meaning

    def of(self, plan: Estimate) -> float:
        """The value for a plan that has one."""
        value = self.compute(plan)
        assert value is not None, f"{self.meaning}: nothing to compare"
        return value

    def spread(self, value: float) -> tuple[float, float]:
        """The values that a prediction of `value` stands for."""
        if self.band == "relative":
            return value * (1 - BAND), value * (1 + BAND)
        return (value - BAND, value) if self.band == "difference" else (value, value)

    def text(self, value: float) -> str:
        """A value with its unit."""
        if self.unit == "yes/no":
            return "yes" if value else "no"
        if self.unit.startswith("of "):
            return f"{100 * value:.1f} % {self.unit}"
        return f"{value:,.4g} {self.unit}" if abs(value) < 1e4 else f"{value:,.0f} {self.unit}"


def _saved(s: Estimate, what: str) -> float:
    """Share of a stage's bytes that recomputation saves."""
    without = s.under(replace(s.config, recompute=replace(s.config.recompute, layers="none")))
    before: float = getattr(without.worst, what)
    after: float = getattr(s.worst, what)
    return 1 - after / before


def _worst_with(s: Estimate, optimizer: str) -> StageMemory:
    return s.under(variants(s.config)[optimizer][0]).worst


def _layer_seconds(s: Estimate) -> float:
    """Forward and backward, with recomputation where most layers have it."""
    recomputed = 2 * len(s.config.recomputed_layers) > s.config.model.layers
    return s.time.layer.forward() + s.time.layer.backward(recomputed=recomputed)


def _group_size(s: Estimate, kind: str) -> int:
    return group(s.layout, s.config.hardware, kind).size


QUANTITIES = {
    "model.parameters_billion": Quantity(
        "B", "parameters of the model", lambda s: s.parameter_counts.total / 1e9
    ),
    "model.fp32_gb": Quantity(
        "GB", "weights at 4 bytes", lambda s: 4 * s.parameter_counts.total / GB
    ),
    "model.fp16_gb": Quantity(
        "GB", "weights at 2 bytes", lambda s: 2 * s.parameter_counts.total / GB
    ),
    "model.expert_modules": Quantity(
        "modules", "layers x experts", lambda s: s.config.model.layers * s.config.model.experts
    ),
    "hardware.total_gb": Quantity(
        "GB", "memory of all devices", lambda s: s.layout.world * s.config.hardware.memory_gb
    ),
    "hardware.ranks": Quantity("devices", "devices of the plan", lambda s: s.layout.world),
    "hardware.devices_per_node": Quantity(
        "devices", "devices of a node", lambda s: s.config.hardware.devices_per_node
    ),
    "hardware.memory_gb": Quantity(
        "GB", "memory of a device", lambda s: s.config.hardware.memory_gb
    ),
    "data.sequence": Quantity("tokens", "length of a sequence", lambda s: s.config.data.sequence),
    "memory.total_gb": Quantity(
        "GB",
        "peak of the fullest rank, optimizer and allowances included",
        lambda s: s.worst.total / GB,
    ),
    "memory.allocated_gb": Quantity(
        "GB",
        "peak of the fullest rank's tensors, optimizer included",
        lambda s: s.worst.allocated / GB,
    ),
    "memory.without_optimizer_gb": Quantity(
        "GB",
        "weights, gradients and activations, no optimizer",
        lambda s: s.worst.without_optimizer / GB,
    ),
    "memory.state_gb": Quantity(
        "GB", "weights, gradients and optimizer state alone", lambda s: s.worst.state.device / GB
    ),
    "memory.plain_adam_gb": Quantity(
        "GB",
        "weights, gradients and plain mixed-precision Adam (18 B)",
        lambda s: _worst_with(s, "plain Adam").state.device / GB,
    ),
    "memory.fraction": Quantity(
        "of a device",
        "peak of the fullest rank over the device's memory",
        lambda s: s.worst.total / s.device_bytes,
    ),
    "memory.plain_adam_fraction": Quantity(
        "of a device",
        "peak of the fullest rank under plain mixed-precision Adam (18 B)",
        lambda s: _worst_with(s, "plain Adam").total / s.device_bytes,
    ),
    "memory.precision_aware_fraction": Quantity(
        "of a device",
        "peak of the fullest rank under the precision-aware optimizer (12 B)",
        lambda s: _worst_with(s, "precision-aware").total / s.device_bytes,
    ),
    "memory.without_optimizer_fraction": Quantity(
        "of a device",
        "peak of the fullest rank without optimizer state",
        lambda s: s.worst.without_optimizer / s.device_bytes,
    ),
    "memory.state_fraction": Quantity(
        "of a device",
        "weights, gradients and optimizer state",
        lambda s: s.worst.state.device / s.device_bytes,
    ),
    "memory.fits": Quantity("yes/no", "whether the fullest rank fits", lambda s: float(s.fits)),
    "memory.recompute_saves": Quantity(
        "of activations", "activations that it saves, at peak", lambda s: _saved(s, "activations")
    ),
    "memory.recompute_saves_total": Quantity(
        "of memory", "tensors saved by recomputation, at peak", lambda s: _saved(s, "allocated")
    ),
    "experts.per_rank": Quantity(
        "experts",
        "experts of each hosted layer on a rank",
        lambda s: s.config.model.experts / s.layout.expert,
    ),
    "experts.modules_per_rank": Quantity(
        "modules", "(layer, expert) pairs on a rank", lambda s: s.parameters(0).expert_modules
    ),
    "experts.share_per_rank": Quantity(
        "of experts",
        "share of all expert parameters on a rank",
        lambda s: s.parameters(0).experts / s.parameter_counts.experts,
    ),
    "experts.hidden_per_rank": Quantity(
        "columns",
        "expert width on a rank",
        lambda s: s.config.model.expert_hidden / s.layout.expert_tensor,
    ),
    "attention.heads_per_rank": Quantity(
        "heads", "attention heads on a rank", lambda s: s.config.model.heads / s.layout.tensor
    ),
    "parallel.tensor": Quantity("ranks", "tensor-parallel ranks", lambda s: s.layout.tensor),
    "parallel.expert": Quantity("ranks", "expert-parallel ranks", lambda s: s.layout.expert),
    "parallel.data": Quantity("replica(s)", "data-parallel replicas", lambda s: s.layout.data),
    "pipeline.stages": Quantity("stages", "pipeline stages", lambda s: s.layout.pipeline),
    "pipeline.layers_per_stage": Quantity(
        "layers", "layers of a stage", lambda s: s.config.model.layers / s.layout.pipeline
    ),
    "pipeline.microbatches": Quantity(
        "micro-batches", "micro-batches of a round", lambda s: s.config.batch.microbatches
    ),
    "batch.accumulation": Quantity(
        "rounds", "rounds of gradient accumulation", lambda s: s.config.batch.accumulation
    ),
    "pipeline.bubble": Quantity(
        "of the pipeline's time",
        "bubble: share in which a stage waits, all micro-batches in one flush",
        lambda s: s.time.bubble,
    ),
    "pipeline.bubble_one_round": Quantity(
        "of the pipeline's time",
        "bubble if every round were flushed",
        lambda s: s.bubble(s.config.batch.microbatches),
    ),
    "time.layer_ms": Quantity(
        "ms",
        "forward and backward of one layer, one micro-batch",
        lambda s: 1e3 * _layer_seconds(s),
        band="relative",
    ),
    "time.layer_forward_ms": Quantity(
        "ms",
        "forward pass of one layer, one micro-batch",
        lambda s: 1e3 * s.time.layer.forward(),
        band="relative",
    ),
    "time.sequences_per_second": Quantity(
        "sequences/s",
        "over all ranks",
        lambda s: s.time.sequences_per_second,
        band="relative",
    ),
    "time.tokens_per_second": Quantity(
        "tokens/s",
        "over all ranks",
        lambda s: s.time.tokens_per_second,
        band="relative",
    ),
    "time.mfu": Quantity(
        "of peak", "model FLOPs utilisation", lambda s: s.time.mfu, band="relative"
    ),
    "parameters.spread": Quantity(
        "of largest",
        "difference between the largest and the smallest rank's parameters",
        compare.parameter_spread,
    ),
    "parameters.expert_spread": Quantity(
        "of largest",
        "difference in experts' parameters alone between ranks",
        lambda s: float(s.config.model.experts % s.layout.expert > 0),
    ),
    "layout.legal": Quantity(
        "yes/no",
        "whether the layout is legal on these ranks",
        lambda s: float(is_legal(s.config, s.layout)),
    ),
    "layout.overlap_legal": Quantity(
        "yes/no", "whether expert communication can be overlapped", compare.overlap_legal
    ),
    "layout.overlap_on": Quantity(
        "yes/no",
        "whether the plan overlaps expert communication",
        lambda s: float(s.config.parallel.overlap_expert_comm) * compare.overlap_legal(s),
    ),
    "layout.expert_group_inside": Quantity(
        "yes/no",
        "whether an expert group stays on one node",
        lambda s: float(group(s.layout, s.config.hardware, "ep").inside),
    ),
    "communication.accumulation_saves": Quantity(
        "of the traffic that reduces gradients",
        "what accumulating saves a token, against a step every round",
        lambda s: 1 - 1 / s.config.batch.accumulation if compare.gradient_gb(s) > 0 else 0.0,
    ),
    "communication.gradient_gb": Quantity(
        "GB", "gradients a rank sends to replicas in a step", compare.gradient_gb
    ),
    "layout.needed_ranks": Quantity(
        "devices",
        "least number of devices, experts placed as planned",
        lambda s: compare.needed_ranks(s.layout, s.layout.expert_stages),
    ),
    "layout.needed_ranks_in_stages": Quantity(
        "devices",
        "least number of devices with experts inside their stages, as Megatron-Core has them",
        lambda s: compare.needed_ranks(s.layout, s.layout.pipeline),
    ),
    "microbatches.enough_alone": Quantity(
        "yes/no",
        "whether twice the micro-batches of a round would gain 1F1B less than 1 %",
        lambda s: float(
            bubble(s.layout.pipeline, s.config.batch.microbatches)
            - bubble(s.layout.pipeline, 2 * s.config.batch.microbatches)
            < 0.01
        ),
    ),
    "microbatches.enough": Quantity(
        "yes/no",
        "all rounds in one flush, of which twice as many would gain less than 1 %",
        lambda s: float(s.bubble(s.microbatches) - s.bubble(2 * s.microbatches) < 0.01),
    ),
    "expert_cache.needed": Quantity(
        "yes/no", "whether experts have to live outside device memory", lambda s: float(not s.fits)
    ),
    "router.balances": Quantity(
        "yes/no",
        "whether routing is learnt and balanced",
        lambda s: float(bool(s.config.model.router.balancing_methods)),
    ),
    "recompute.layers": Quantity(
        "layers", "layers recomputed whole", lambda s: len(s.config.recomputed_layers)
    ),
    "feature.batched_exchange": Quantity(
        "yes/no",
        "tokens of all experts of a rank travel together",
        lambda s: float(_group_size(s, "ep") > 1),
    ),
    "deployment.layers": Quantity(
        "layers", "layers that the stages' lists cover exactly once", compare.covered_layers
    ),
    "deployment.modules": Quantity(
        "modules", "expert modules that the plan's map places", compare.placed_modules
    ),
    "deployment.patterns": Quantity(
        "yes/no", "every group of more than one rank has its pattern", compare.has_patterns
    ),
    "deployment.complete": Quantity(
        "yes/no", "the plan has all that a graph of the step needs", compare.deployment_complete
    ),
    "deployment.strategies": Quantity(
        "yes/no", "the resolved config states every strategy that runs", compare.states_strategies
    ),
    "schedule.gain": Quantity(
        "of step",
        "what the best interleaved 1F1B saves over the best plain one, experts in their stages",
        compare.schedule_gain,
        compare.best_schedule,
        band="difference",
        searches=True,
    ),
    "layout.gain": Quantity(
        "of a step's time",
        "what the best other layout that fits saves",
        compare.layout_gain,
        compare.better_overrides,
        band="difference",
        searches=True,
    ),
    "pipeline.bubble_document": Quantity(
        "of the pipeline's time",
        "bubble of 1F1B with the micro-batches of one round, (P - 1) / (M + P - 1), uniform stages",
        lambda s: bubble(s.layout.pipeline, s.config.batch.microbatches),
    ),
    "recompute.whole_layers": Quantity(
        "layers",
        "layers recomputed whole, with the experts that their tokens visit",
        lambda s: len(s.config.recomputed_layers) * (not s.layout.span),
    ),
    "published.bf16_mfu": Quantity(
        "of peak",
        "highest MFU of a BF16 MoE run that was published: Mixtral 8x22B with token drop on 128 "
        "H100, arXiv:2504.14960, table 4",
        lambda _: 0.522,
    ),
}
"""All quantities by name."""
