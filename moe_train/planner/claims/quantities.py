"""Counts, bytes and times that a claim can name, each one line of the plan."""

from __future__ import annotations

from collections.abc import Callable

from moe_train.parallel.optimizer_state import variants
from moe_train.parallel.parameters import model_parameters, rank_parameters
from moe_train.planner.claims.subject import Subject, quantity
from moe_train.planner.memory.fit import capacity
from moe_train.planner.memory.stages import GB, StageMemory


def _simple(name: str, unit: str, meaning: str, compute: Callable[[Subject], float]) -> None:
    quantity(name, unit, meaning)(compute)


def _total(s: Subject) -> int:
    return model_parameters(s.config.model, s.vocab).total


def _modules(s: Subject) -> float:
    held = rank_parameters(s.config.model, s.layout, 0, s.vocab)
    return held.expert_modules


def _saved(s: Subject, what: str) -> float:
    before: float = getattr(s.recomputing("none").fullest, what)
    after: float = getattr(s.fullest, what)
    return 1 - after / before


def _plain(s: Subject) -> StageMemory:
    return s.changed(variants(s.config)["plain Adam"][0]).fullest


def _precision_aware(s: Subject) -> StageMemory:
    return s.changed(variants(s.config)["precision-aware"][0]).fullest


_simple("model.parameters_billion", "B", "parameters of the model",
        lambda s: _total(s) / 1e9)  # fmt: skip
_simple("model.fp32_gb", "GB", "weights at 4 bytes", lambda s: 4 * _total(s) / GB)
_simple("model.fp16_gb", "GB", "weights at 2 bytes", lambda s: 2 * _total(s) / GB)
_simple("model.expert_modules", "modules", "layers x experts",
        lambda s: s.config.model.layers * s.config.model.experts)  # fmt: skip
_simple("hardware.total_gb", "GB", "memory of all devices",
        lambda s: s.layout.world * s.config.hardware.memory_gb)  # fmt: skip
_simple("hardware.ranks", "devices", "devices of the plan", lambda s: s.layout.world)
_simple("hardware.devices_per_node", "devices", "devices of a node",
        lambda s: s.config.hardware.devices_per_node)  # fmt: skip
_simple("memory.total_gb", "GB", "peak of the fullest rank, optimizer and allowances included",
        lambda s: s.fullest.total / GB)  # fmt: skip
_simple("memory.allocated_gb", "GB", "peak of the fullest rank's tensors, optimizer included",
        lambda s: s.fullest.allocated / GB)  # fmt: skip
_simple("memory.without_optimizer_gb", "GB", "weights, gradients and activations, no optimizer",
        lambda s: s.fullest.without_optimizer / GB)  # fmt: skip
_simple("memory.state_gb", "GB", "weights, gradients and optimizer state alone",
        lambda s: s.fullest.state.device / GB)  # fmt: skip
_simple("memory.plain_adam_gb", "GB", "weights, gradients and plain mixed-precision Adam (18 B)",
        lambda s: _plain(s).state.device / GB)  # fmt: skip
_simple("memory.fraction", "of device", "peak of the fullest rank over the device's memory",
        lambda s: s.fullest.total / capacity(s.config))  # fmt: skip
_simple("memory.plain_adam_fraction", "of device",
        "peak of the fullest rank under plain mixed-precision Adam (18 B)",
        lambda s: _plain(s).total / capacity(s.config))  # fmt: skip
_simple("memory.precision_aware_fraction", "of device",
        "peak of the fullest rank under the precision-aware optimizer (12 B)",
        lambda s: _precision_aware(s).total / capacity(s.config))  # fmt: skip
_simple("memory.without_optimizer_fraction", "of device",
        "peak of the fullest rank without optimizer state",
        lambda s: s.fullest.without_optimizer / capacity(s.config))  # fmt: skip
_simple("memory.state_fraction", "of device", "weights, gradients and optimizer state",
        lambda s: s.fullest.state.device / capacity(s.config))  # fmt: skip
_simple("memory.fits", "yes/no", "whether the fullest rank fits",
        lambda s: float(s.fullest.total <= capacity(s.config)))  # fmt: skip
_simple("memory.recompute_saves", "of activations", "activations that it saves, at peak",
        lambda s: _saved(s, "activations"))  # fmt: skip
_simple("memory.recompute_saves_total", "of memory", "tensors saved by recomputation, at peak",
        lambda s: _saved(s, "allocated"))  # fmt: skip
_simple("experts.per_rank", "experts", "experts of each hosted layer on a rank",
        lambda s: s.config.model.experts / s.layout.expert)  # fmt: skip
_simple("experts.modules_per_rank", "modules", "(layer, expert) pairs on a rank", _modules)
_simple("experts.share_per_rank", "of experts", "share of all expert parameters on a rank",
        lambda s: rank_parameters(s.config.model, s.layout, 0, s.vocab).experts
        / model_parameters(s.config.model, s.vocab).experts)  # fmt: skip
_simple("experts.hidden_per_rank", "columns", "expert width on a rank",
        lambda s: s.config.model.expert_hidden / s.layout.expert_tensor)  # fmt: skip
_simple("attention.heads_per_rank", "heads", "attention heads on a rank",
        lambda s: s.config.model.heads / s.layout.tensor)  # fmt: skip
_simple("parallel.tensor", "ranks", "tensor-parallel ranks", lambda s: s.layout.tensor)
_simple("parallel.expert", "ranks", "expert-parallel ranks", lambda s: s.layout.expert)
_simple("parallel.data", "replicas", "data-parallel replicas", lambda s: s.layout.data)
_simple("pipeline.stages", "stages", "pipeline stages", lambda s: s.layout.pipeline)
_simple("pipeline.layers_per_stage", "layers", "layers of a stage",
        lambda s: s.config.model.layers / s.layout.pipeline)  # fmt: skip
_simple("pipeline.microbatches", "micro-batches", "micro-batches of a round",
        lambda s: s.config.batch.microbatches)  # fmt: skip
_simple("batch.accumulation", "rounds", "rounds of gradient accumulation",
        lambda s: s.config.batch.accumulation)  # fmt: skip
_simple("pipeline.bubble", "of step", "share of a step in which a stage waits",
        lambda s: s.time.bubble)  # fmt: skip
_simple("pipeline.bubble_one_round", "of step", "bubble if every round were flushed",
        lambda s: s.bubble(s.config.batch.microbatches))  # fmt: skip
_simple("time.layer_ms", "ms", "forward and backward of one layer, one micro-batch",
        lambda s: 1e3 * (s.time.layer.forward()
                         + s.time.layer.backward(recomputed=s.layer_is_recomputed)))  # fmt: skip
_simple("time.layer_forward_ms", "ms", "forward pass of one layer, one micro-batch",
        lambda s: 1e3 * s.time.layer.forward())  # fmt: skip
_simple("time.sequences_per_second", "sequences/s", "over all ranks",
        lambda s: s.time.sequences_per_second)  # fmt: skip
_simple("time.tokens_per_second", "tokens/s", "over all ranks",
        lambda s: s.time.tokens_per_second)  # fmt: skip
_simple("time.mfu", "of peak", "model FLOPs utilisation", lambda s: s.time.mfu or 0.0)
