"""Memory, compute, communication and time of a plan, as one plain mapping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe_train.config.schema import to_mapping
from moe_train.parallel.flops import flops_per_token
from moe_train.parallel.optimizer_state import bytes_per_parameter, variants
from moe_train.planner.cost.communication import step_traffic
from moe_train.planner.cost.compute import dense_parts, embedding_parts, expert_parts, head_parts
from moe_train.planner.cost.timing import StepTime
from moe_train.planner.memory.fit import TIGHT
from moe_train.planner.memory.layers import owner_terms, saved_terms, whole_layer
from moe_train.planner.memory.stages import GB, StageMemory, plan_memory, worst
from moe_train.planner.plan import BAND, Plan
from moe_train.planner.search.terms import step_terms

ASSUMED = {
    "routing": "every rank's experts receive imbalance x the average rows; memory holds "
    "memory_imbalance x the average if that is more",
    "allocator": "fragmentation is that share of all tensors",
    "optimizer": "master weights are whole: precision-aware is 12 bytes a parameter, and would be "
    "10 with TransformerEngine's 16-bit remainders, which checkpoints cannot hold",
    "order": "kernels of one device run one after the other; a layer takes the longer of its "
    "kernels and of the host's launches",
    "exchange": "waits for the busiest rank; exposed unless parallel.overlap_expert_comm is on, "
    "which hides a share of it and slows compute meanwhile",
    "ring": "keys and values pass from rank to rank beside attention's steps (cp_comm_type p2p); "
    "the causal mask leaves every rank the same work",
    "gradients": "reduction hides behind one micro-batch's backward pass where it overlaps, its "
    "exchange left out",
    "weights": "backward reads them once and moves their gradients into the buffer: inside the "
    "product on an accelerator, by an addition of its own on a CPU",
    "flops": "backward is twice the forward pass; recomputation is time, not useful work",
}
"""Assumptions behind the figures."""

SOURCES = {
    "memory": "Korthikanti et al., arXiv:2205.05198; ZeRO, arXiv:1910.02054; Megatron-Core 0.19",
    "in flight": "Narayanan et al., arXiv:2104.04473; tick-aligned 1F1B for placement=span",
    "flops": "PaLM, arXiv:2204.02311, appendix B, with causal scores",
    "kernels": "roofline, Williams et al. 2009, with the profile's efficiencies",
    "collectives": "Thakur et al. 2005: ring (n-1)/n, all-to-all 1/n to each peer; calls of "
    "Megatron-Core 0.19",
    "constants": "fitted to published runs on GPUs (planner/cost/constants.py)",
    "ring": "ring attention, arXiv:2310.01889; messages, kernels and merges of TransformerEngine's "
    "context_parallel.py",
    "bubble": "share of the pipeline's time in which a stage waits, averaged over the stages; of "
    "uniform stages (P-1)/(vM+P-1), arXiv:2104.04473",
}
"""Where the formulas come from."""


def cost_report(plan: Plan, memory: Sequence[StageMemory], time: StepTime) -> dict[str, Any]:
    """What the plan costs; bytes, seconds and operations, per rank unless it says otherwise."""
    return {
        "assumptions": {**asdict(plan.assumptions), **ASSUMED},
        "sources": SOURCES,
        "hardware": to_mapping(plan.config)["hardware"],
        "memory": {
            "device_bytes": plan.device_bytes,
            "stages": [_stage(plan, one) for one in memory],
            "worst_stage": worst(memory).stage,
            "margin_gb": worst(memory).margin / GB,
            "margin_share": worst(memory).margin / plan.device_bytes,
            "tight": worst(memory).margin < TIGHT * plan.device_bytes,
            "optimizers": optimizer_rows(plan),
            "layer_terms": _layer_terms(plan),
        },
        "compute": _compute(plan, time),
        "communication": [asdict(one) for one in step_traffic(plan, plan.layout.pipeline // 2)],
        "time": _time(plan, time),
    }


def _stage(plan: Plan, one: StageMemory) -> dict[str, Any]:
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
        "margin_bytes": one.margin,
        "fraction": one.total / plan.device_bytes if plan.device_bytes else None,
    }


def optimizer_rows(plan: Plan) -> list[dict[str, Any]]:
    """The worst stage under each optimizer, and without one; bytes.

    ``each`` has the bytes per parameter, by what they are for, before any sharding.
    """

    def row(name: str, overrides: str, state: float, total: float, host: float) -> dict[str, Any]:
        return {
            "optimizer": name,
            "overrides": overrides,
            "state_bytes": state,
            "activation_bytes": need.activations,
            "tensor_bytes": state + need.activations,
            "total_bytes": total,
            "host_bytes": host,
            "fraction": total / plan.device_bytes if plan.device_bytes else None,
            "fits": total <= plan.device_bytes,
        }

    rows: list[dict[str, Any]] = []
    for name, (config, overrides) in variants(plan.config).items():
        need = worst(plan_memory(plan.under(config)))
        state = need.state
        each = asdict(bytes_per_parameter(config.dtype, config.optim))
        rows.append({**row(name, overrides, state.device, need.total, state.host), "each": each})
        if name == "precision-aware":
            without = need.total - state.optimizer
            first = row("no optimizer state", "", state.weights + state.gradients, without, 0)
    return [first, *rows]


def _layer_terms(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    z, modules = plan.memory_shapes, plan.config.recompute.modules
    terms = {
        "kept": saved_terms(z, recomputed=False, modules=modules),
        "kept_when_recomputed": saved_terms(z, recomputed=True),
        "whole": whole_layer(z),
        **({"hosted": owner_terms(z, modules)} if z.span else {}),
    }
    return {name: [asdict(term) for term in some] for name, some in terms.items()}


def _compute(plan: Plan, time: StepTime) -> dict[str, Any]:
    config, layout, z = plan.config, plan.layout, plan.shapes
    flops = flops_per_token(config.model, config.data.sequence, plan.vocab)
    parts = [
        *dense_parts(config, z),
        *expert_parts(config, z, layers=layout.pipeline // layout.expert_stages),
    ]
    ends = [*embedding_parts(config, z), *head_parts(config, z)]
    recomputes = bool(config.recomputed_layers)
    forward, backward = time.layer.forward(), time.layer.backward(recomputed=recomputes)
    return {
        "flops_per_token": {**asdict(flops), "total": flops.total},
        "layer_parts": [asdict(part) for part in parts],
        "end_parts": [asdict(part) for part in ends],
        "layer_forward_seconds": forward,
        "layer_backward_seconds": backward,
        "layer_seconds": forward + backward,
        "layer_is_recomputed": recomputes,
    }


def _time(plan: Plan, time: StepTime) -> dict[str, Any]:
    return {
        "stages": [asdict(one) for one in time.stages],
        "pipeline_seconds": time.pipeline,
        "exposed_gradient_seconds": time.gradients,
        "optimizer_seconds": time.optimizer,
        "step_seconds": time.step,
        "bubble": time.bubble,
        "tokens_per_second": time.tokens_per_second,
        "sequences_per_second": time.sequences_per_second,
        "mfu": time.mfu,
        "band": BAND,
        "terms": dict(sorted(step_terms(plan, time).items(), key=lambda one: -one[1])),
    }
