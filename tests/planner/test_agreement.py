"""The planner and Megatron agree on random configs, and the planner never crashes on one."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from moe_train.config.schema import to_mapping, with_values
from moe_train.errors import ConfigError
from moe_train.parallel.resolved import resolved_run
from moe_train.planner.estimate import estimate
from moe_train.planner.legality import check
from moe_train.planner.search.automatic import resolve
from moe_train.testing.world import run_world
from tests.support.draws import base, draw
from tests.support.oracle import refusals

ON_PURPOSE = {
    # field: words of the rule, where Megatron would go on and something else would suffer
    "recompute.modules": ("no shared expert", "whole layers and single modules"),
    "optim.moment_dtype": ("bf16 needs optim.precision_aware",),  # Megatron ignores it
    "optim.grad_dtype": ("bf16 gradients of fp32 weights",),  # and this
    "model.router.groups": ("needs both", "does not work with sinkhorn"),  # and this
    "model.router.groups_per_token": (
        "needs both",
        "cannot hold",  # fails, or chooses nothing, in the first forward pass
    ),
    "model.router.expert_bias": ("does not work with sinkhorn",),  # sinkhorn reads neither
    "parallel.overlap_param_gather": ("needs the distributed",),  # Megatron-LM's own arguments
    "parallel.overlap_expert_comm": ("forbids recomputing whole layers",),  # layers are ours
    "model.kv_heads": ("does not divide model.heads", "fp8 products"),
    "model.head_dim": ("fp8 products",),  # TransformerEngine's kernels, which nobody runs here
    "model.hidden": ("fp8 products",),
    "model.expert_hidden": ("fp8 products",),
    "model.shared_expert_hidden": ("fp8 products",),
    "data.sequence": ("fp8 products",),
    "parallel.context": ("attention over parts",),  # the host's attention would go on, wrongly
}


def on_purpose(fault: ConfigError) -> bool:
    """Whether a fault is one that Megatron is not expected to find."""
    return any(word in fault.problem for word in ON_PURPOSE.get(fault.field, ()))


def never_crashes(number: int, seed: int) -> Counter[str]:
    """Plan random configs of both placements; nothing but our own errors may come out."""
    chance, starts = random.Random(seed), (base("cpu"), base("cuda"))
    outcomes: Counter[str] = Counter()
    for _ in range(number):
        placement = chance.choice(("stage", "stage", "span"))
        config, world, drawn = draw(chance, chance.choice(starts), placement)
        if chance.random() < 0.3:
            # Sizes left open are the search's to fill.
            free = chance.sample(("tensor", "pipeline", "expert"), chance.choice((1, 3)))
            sizes = {f"parallel.{name}": None for name in free}
            config = with_values(config, {"parallel.auto": True, **sizes})
        config = resolve(config, world)
        faults = check(config, world)
        assert all(isinstance(fault, ConfigError) and fault.fix for fault in faults), drawn
        if faults:
            outcomes["refused"] += 1
            continue
        plan = estimate(resolved_run(config, world))
        report, fault = plan.report(), plan.memory_fault
        assert report["parameters"]["total"] > 0
        outcomes["accepted" if fault is None else "too large"] += 1
    return outcomes


@pytest.mark.parametrize(
    "number", [1000, pytest.param(9000, marks=[pytest.mark.full, pytest.mark.timeout(900)])]
)
def test_planning_raises_nothing_but_its_own_errors(number: int) -> None:
    outcomes = never_crashes(number, seed=number)
    assert min(outcomes["accepted"], outcomes["refused"]) > number // 5, outcomes


FULL = pytest.mark.full
BATCHES = [("cpu", 0, 40), ("cuda", 0, 40)]
LONG = [
    pytest.param(device, seed, 60, marks=[FULL, pytest.mark.timeout(600)])
    for device in ("cpu", "cuda")
    for seed in (1, 2, 3)
]


@pytest.mark.world
@pytest.mark.parametrize(("device", "seed", "number"), [*BATCHES, *LONG])
def test_megatron_accepts_and_refuses_the_same(device: str, seed: int, number: int) -> None:
    chance, start = random.Random(f"{device}{seed}"), base(device)
    args: list[tuple[dict[str, Any], int]] = []
    planner: list[list[ConfigError]] = []
    for _ in range(number):
        config, world, _ = draw(chance, start, "stage")
        config = resolve(config, world)
        args.append((to_mapping(config), world))
        planner.append(check(config, world))
    [megatron] = run_world(refusals, 1, args, timeout=500)
    tally: Counter[tuple[bool, bool]] = Counter()
    for (config_, world), faults, lines in zip(args, planner, megatron, strict=True):
        tally[(not faults, not lines)] += 1
        if not faults:
            assert not lines, f"accepted on {world} ranks, but Megatron says {lines}: {config_}"
        elif not lines:
            strict = [fault for fault in faults if not on_purpose(fault)]
            assert not strict, f"Megatron accepts on {world} ranks: {strict}, {config_}"
    agreed = tally[(True, True)], tally[(False, False)]
    assert min(agreed) >= number // 6, f"a lopsided sample: {tally}"
