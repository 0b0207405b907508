"""Every token dispatcher is checked, planned and trained from its one descriptor."""

from __future__ import annotations

import dataclasses

import pytest

from moe_train.config.compose import collect
from moe_train.features.dispatchers import DISPATCHERS, SPAN, Dispatcher
from moe_train.parallel.layout import GROUPS
from moe_train.parallel.sizes import layout_of
from moe_train.planner.cost.calls import OPERATIONS
from moe_train.planner.cost.timing import step_time
from moe_train.planner.legality import check
from moe_train.planner.plan import Plan, assumptions_of
from moe_train.testing import layouts
from moe_train.testing.compare import compare
from moe_train.testing.layouts import Runs

ALL = [*DISPATCHERS.values(), SPAN]


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_descriptor_is_complete(one: Dispatcher) -> None:
    assert {each.operation for each in one.collectives} <= OPERATIONS.keys()
    assert {each.group for each in one.collectives} <= GROUPS.keys()
    assert {each.part for each in one.collectives} == {"dispatch", "combine"}
    for direction in ("forward", "backward"):
        assert sum(getattr(each, direction) for each in one.collectives)


@pytest.mark.parametrize("name", DISPATCHERS)
def test_descriptor_is_legal_and_planned(name: str) -> None:
    expert = ["parallel.expert=2", f"parallel.dispatcher={name}"]
    config, result = collect(["experiment=moe_30b_8x64gb", "parallel.placement=stage", *expert])
    assert not result and not check(config, 8)
    layout = layout_of(config, 8)
    free = dataclasses.replace(layout, expert=1)
    with_exchange, without = (
        step_time(
            Plan(config, each, 50_304, assumptions=assumptions_of(config))
        ).layer.exchange.forward
        for each in (layout, free)
    )
    # TP2 gathers tokens over tp_ep even with EP=1.
    assert with_exchange > without >= 0


@pytest.mark.world
@pytest.mark.parametrize(
    # All-to-all is every other test's.
    "name",
    [n for n, one in DISPATCHERS.items() if n != "alltoall" and not one.fused_permutation],
)
def test_curve_is_that_of_all_to_all(small_runs: Runs, name: str) -> None:
    two = ("train.steps=2", "optim.decay_steps=20")
    run = small_runs.get(layouts.TP2_EP2, f"parallel.dispatcher={name}", *two)
    result = compare(run, small_runs.get(layouts.SINGLE))
    assert result.within(), f"{name}\n{result}"
