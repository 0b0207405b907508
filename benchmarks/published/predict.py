"""A published run as a plan, its figure as seconds of a step, and the prediction beside it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from benchmarks.published.rows import Entry, entry
from moe_train.parallel.flops import flops_per_token
from moe_train.parallel.resolved import ResolvedRun
from moe_train.planner.cost.constants import natural_imbalance
from moe_train.planner.estimate import Estimate
from moe_train.planner.plan import assumptions_of
from moe_train.planner.resolution import resolve_run


def overrides(one: Entry) -> list[str]:
    """The run as config overrides, as `moe-train plan` takes them."""
    run, layout = one.run, one.run.layout
    flex = {"deepep", "hybridep"}
    values: dict[str, object] = {
        "hardware": run.hardware,
        "device": "cuda",
        "dtype": run.dtype,
        **_flat("model", one.model.model),
        **{f"parallel.{name}": getattr(layout, name) for name in layout.__dataclass_fields__},
        "parallel.placement": "stage",
        "parallel.dispatcher": "flex" if run.dispatcher in flex else run.dispatcher,
        "parallel.overlap_expert_comm": "expert" in run.overlap,
        "parallel.overlap_grad_reduce": run.grad_overlap,
        "parallel.overlap_param_gather": run.grad_overlap,
        "batch.global": run.global_,
        "batch.micro": run.micro,
        "data.sequence": run.sequence,
        "optim.distributed": True,
        "optim.precision_aware": run.precision_aware or run.grad_dtype != "fp32",
        "optim.moment_dtype": run.moment_dtype,
        "optim.grad_dtype": run.grad_dtype,
        "recompute.layers": run.recompute if isinstance(run.recompute, str) else "none",
        "recompute.modules": [] if isinstance(run.recompute, str) else run.recompute,
        "model.router.force_balance": run.routing == "forced",
    }
    if run.routing == "drop":
        values |= {"model.router.capacity_factor": 1.0, "model.router.pad_to_capacity": True}
    if run.stages:
        values["parallel.stages"] = f"'{run.stages}'"
    megatron: dict[str, object] = {}
    if run.fp8_recipe:
        megatron["fp8_recipe"] = run.fp8_recipe
    if run.dtype == "fp8" and run.fp8_param_gather:
        values["megatron.ddp.fp8_param_gather"] = True
    if run.cuda_graphs:
        megatron |= {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": run.cuda_graphs}
    if run.dispatcher in flex:
        megatron["moe_flex_dispatcher_backend"] = run.dispatcher
    return [
        *(f"{key}={_text(value)}" for key, value in values.items()),
        *(f"megatron.transformer.{key}={_text(value)}" for key, value in megatron.items()),
    ]


def _flat(prefix: str, values: dict[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}"
        flat |= _flat(name, value) if isinstance(value, dict) else {name: value}
    return flat


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)


@cache
def resolved(name: str) -> ResolvedRun:
    """The run of one row, resolved once."""
    one = entry(name)
    return resolve_run(overrides(one), one.run.gpus)


def predicted_seconds(one: Entry) -> float:
    """Predicted seconds of a step."""
    run = resolved(one.run.id)
    even = one.run.routing != "natural"
    imbalance = 1.0 if even else natural_imbalance(run.config)
    return Estimate.of(run, replace(assumptions_of(run.config), imbalance=imbalance)).time.step


def published_seconds(one: Entry) -> float:
    """Seconds of a step that the figure says, under its source's count of FLOPs."""
    run, plan = one.run, resolved(one.run.id)
    tokens = run.global_ * run.sequence
    if run.unit == "seconds":
        return run.figure
    if run.unit == "tokens":
        return tokens / (run.figure * run.gpus)
    flops = flops_per_token(plan.config.model, run.sequence, plan.vocab)
    # The other half of the attention matrix, with the diagonal that both halves have.
    whole = flops.scores * (run.sequence - 1) / (run.sequence + 1)
    count = flops.total + (whole if run.attention_flops == "full" else 0.0)
    rate = run.figure * (run.peak_tflops or 1.0) if run.unit == "mfu" else run.figure
    return tokens * count / (rate * 1e12 * run.gpus)


def rate(one: Entry, seconds: float) -> float:
    """Model TFLOP/s of a GPU at so many seconds a step, by the planner's count of FLOPs."""
    run, plan = one.run, resolved(one.run.id)
    flops = flops_per_token(plan.config.model, run.sequence, plan.vocab).total
    return run.global_ * run.sequence * flops / (seconds * run.gpus) / 1e12
