"""``megatron.*`` overrides: those that a formula reads change the plan, others are named."""

from __future__ import annotations

import pytest

from moe_train.config.hardware import MachineFacts
from moe_train.config.megatron_fields import megatron_fields
from moe_train.planner.estimate import estimate
from moe_train.planner.overrides import NEUTRAL, PRICED, unpriced_overrides
from moe_train.planner.report.warnings import plan_warnings
from moe_train.planner.resolution import resolve_launch, resolve_run

PLAN = [
    *("model=moe_30b", "hardware=h100_80gb", "device=cuda", "recompute=none", "data.sequence=4096"),
    *("parallel.placement=stage", "parallel.expert=8", "optim.distributed=true", "batch.global=64"),
]
GRAPHS = "megatron.transformer.cuda_graph_impl=transformer_engine"


def figures(*more: str) -> tuple[float, float]:
    plan = estimate(resolve_run([*PLAN, *more], 8))
    return plan.time.step, plan.worst.total


@pytest.mark.parametrize(
    ("before", "override"),
    [
        (["dtype=bf16"], f"{GRAPHS} megatron.transformer.cuda_graph_scope=[moe_router]"),
        (["dtype=bf16"], "megatron.transformer.gradient_accumulation_fusion=true"),
        (["dtype=fp8"], "megatron.ddp.fp8_param_gather=true"),
    ],
)
def test_priced_fields_change_time_or_memory(before, override):
    assert figures(*before) != figures(*before, *override.split())


@pytest.mark.parametrize("section", ["transformer", "ddp", "optimizer"])
def test_the_fields_are_megatron_s(section):
    assert PRICED[section] | NEUTRAL[section] <= set(megatron_fields(section))


def test_others_are_named_in_the_plan_and_at_the_start():
    other = ["megatron.transformer.moe_deepep_num_sms=24", "megatron.optimizer.adam_eps=1e-7"]
    run = resolve_run([*PLAN, "dtype=bf16", *other], 8)
    assert unpriced_overrides(run.config) == ["megatron.transformer.moe_deepep_num_sms"]
    assert any("moe_deepep_num_sms" in text for text in plan_warnings(estimate(run)))
    small = ["device=cpu", "model=small", "recompute=none", "parallel.placement=stage", other[0]]
    started = resolve_launch(small, 2, MachineFacts(kind="cpu", count=2, memory_gb=0.0))
    assert any("moe_deepep_num_sms" in note for note in started.notes)
