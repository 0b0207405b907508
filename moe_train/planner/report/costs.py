"""Memory, compute, communication and time of a plan, as one plain mapping."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moe_train.config.root import Config
from moe_train.features import schedules
from moe_train.parallel.flops import flops_per_token
from moe_train.parallel.layout import Layout
from moe_train.parallel.parameters import rank_parameters
from moe_train.parallel.shapes import Assumptions, shapes
from moe_train.planner.cost import communication, compute, timing
from moe_train.planner.memory.fit import capacity, memory_rows, profile
from moe_train.planner.memory.layers import hosted_terms, kept_terms, whole_layer
from moe_train.planner.memory.stages import StageMemory, plan_memory, worst
from moe_train.planner.terms import Term

ASSUMED = {
    "routing": "every rank's experts receive imbalance x the average rows",
    "allocator": "fragmentation is that share of what comes and goes; state is allocated once",
    "optimizer": "master weights are whole: precision-aware is 12 bytes a parameter, and would be "
    "10 with TransformerEngine's 16-bit remainders, which checkpoints cannot hold",
    "order": "kernels of one device run one after the other",
    "exchange": "expert all-to-all is exposed unless parallel.overlap_expert_comm is on",
    "gradients": "reduction hides behind one micro-batch's backward pass where it overlaps",
    "weights": "backward reads them once and moves their gradients into the buffer: inside the "
    "product on an accelerator, by an addition of its own on the host",
    "flops": "backward is twice the forward pass; recomputation is time, not useful work",
}
"""What the figures take for granted, in words."""

SOURCES = {
    "memory": "Korthikanti et al., arXiv:2205.05198; ZeRO, arXiv:1910.02054; Megatron-Core 0.19",
    "in flight": "Narayanan et al., arXiv:2104.04473; tick-aligned 1F1B for placement=span",
    "flops": "PaLM, arXiv:2204.02311, appendix B, with causal scores",
    "kernels": "roofline, Williams et al. 2009, with the profile's efficiencies",
    "collectives": "Thakur et al. 2005: ring (n-1)/n, all-to-all 1/n to each peer; calls of "
    "Megatron-Core 0.19",
    "bubble": "of uniform stages: (P-1)/(vM+P-1), arXiv:2104.04473; under placement=span experts "
    "have none (features/schedules.py)",
}
"""Where the formulas come from."""


def cost_report(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions
) -> dict[str, Any]:
    """What the plan costs; bytes, seconds and operations, per rank unless it says otherwise."""
    stages = plan_memory(config, layout, vocab, assumptions)
    time = timing.step_time(config, layout, vocab, assumptions)
    return {
        "assumptions": {**asdict(assumptions), **ASSUMED},
        "sources": SOURCES,
        "hardware": profile(config),
        "memory": {
            "device_bytes": capacity(config),
            "stages": [_stage(config, one) for one in stages],
            "worst_stage": worst(stages).stage,
            "optimizers": memory_rows(config, layout, vocab, assumptions),
            "layer_terms": _layer_terms(config, layout, vocab, assumptions),
        },
        "compute": _compute(config, layout, vocab, assumptions, time),
        "communication": _communication(config, layout, vocab, assumptions, time),
        "time": _time(time, layout.span),
    }


def _stage(config: Config, one: StageMemory) -> dict[str, Any]:
    return {
        "stage": one.stage,
        "held": one.held,
        "weight_bytes": one.state.weights,
        "gradient_bytes": one.state.gradients,
        "optimizer_bytes": one.state.optimizer,
        "host_bytes": one.state.host,
        "one_microbatch_bytes": one.one_microbatch,
        "hosted_bytes": one.hosted,
        "activation_bytes": one.activations,
        "peak": one.peak.name,
        "buffers": [asdict(term) for term in one.peak.buffers],
        "allocated_bytes": one.allocated,
        "fragmentation_bytes": one.fragmentation,
        "reserved_bytes": one.reserved,
        "total_bytes": one.total,
        "fraction": one.total / capacity(config) if capacity(config) else None,
    }


def _layer_terms(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions
) -> dict[str, list[dict[str, Any]]]:
    z = shapes(config, layout, vocab, assumptions)
    modules = config.recompute.modules

    def plain(terms: list[Term]) -> list[dict[str, Any]]:
        return [asdict(term) for term in terms]

    found = {
        "kept": plain(kept_terms(z, recomputed=False, modules=modules, span=layout.span)),
        "kept_when_recomputed": plain(kept_terms(z, recomputed=True, span=layout.span)),
        "whole": plain(whole_layer(z, span=layout.span)),
    }
    if layout.span:
        found["hosted"] = plain(hosted_terms(z, modules))
    return found


def _compute(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions, time: timing.StepTime
) -> dict[str, Any]:
    z = shapes(config, layout, vocab, assumptions)
    flops = flops_per_token(config.model, config.data.sequence, vocab)
    parts = [
        *compute.dense_parts(config, z),
        *compute.expert_parts(config, z, layers=layout.pipeline if layout.span else 1),
    ]
    recomputes = bool(config.recomputed_layers)
    layer = time.layer
    return {
        "flops_per_token": {**asdict(flops), "total": flops.total},
        "layer_parts": [asdict(part) for part in parts],
        "end_parts": [
            asdict(part)
            for part in (*compute.embedding_parts(config, z), *compute.head_parts(config, z))
        ],
        "layer_forward_seconds": layer.forward(),
        "layer_backward_seconds": layer.backward(recomputed=recomputes),
        "layer_seconds": layer.forward() + layer.backward(recomputed=recomputes),
        "layer_is_recomputed": recomputes,
    }


def _communication(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions, time: timing.StepTime
) -> list[dict[str, Any]]:
    z = shapes(config, layout, vocab, assumptions)
    stage = layout.pipeline // 2
    layers = layout.stage_layers(stage)
    whole = config.recomputed_layers
    rank = layout.stage_ranks(stage)[0]
    held = rank_parameters(config.model, layout, rank, vocab)
    traffic = communication.step_traffic(
        config, layout, z, held, stage, time.microbatches, len(whole.intersection(layers))
    )
    return [asdict(one) for one in traffic]


def _time(time: timing.StepTime, span: bool) -> dict[str, Any]:
    return {
        "stages": [asdict(one) for one in time.stages],
        "pipeline_seconds": time.pipeline,
        "exposed_gradient_seconds": time.gradients,
        "optimizer_seconds": time.optimizer,
        "step_seconds": time.step,
        "bubble": time.bubble,
        "bubble_formula": (schedules.span_bubble if span else schedules.bubble).__doc__,
        "tokens_per_second": time.tokens_per_second,
        "sequences_per_second": time.sequences_per_second,
        "mfu": time.mfu,
    }
