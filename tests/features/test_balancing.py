"""Every balancing method is complete; tests/model/test_router.py trains each in every layout."""

from __future__ import annotations

import pytest

from moe_train.config.compose import collect
from moe_train.config.model import RouterConfig
from moe_train.features.balancing import BALANCING, EXPERT_BIAS, Balancing
from moe_train.parallel.groups import used_kinds
from moe_train.parallel.layout import GROUPS
from moe_train.parallel.sizes import layout_of
from moe_train.planner.cost.calls import OPERATIONS
from moe_train.planner.legality import check
from tests.model.test_router import OPTIONS


@pytest.mark.parametrize("one", [*BALANCING.values(), EXPERT_BIAS], ids=lambda one: one.name)
def test_descriptor_is_complete(one: Balancing) -> None:
    assert one.name in OPTIONS, "tests/model/test_router.py trains it"
    assert {each.operation for each in one.collectives} <= OPERATIONS.keys()
    assert {each.group for each in one.collectives} | set(one.step_groups) <= GROUPS.keys()
    assert {each.part for each in one.collectives} <= {"router"}
    assert all(hasattr(RouterConfig(), name) for name in one.excludes)


@pytest.mark.parametrize("name", BALANCING)
def test_descriptor_is_legal_and_its_groups_are_counted(name: str) -> None:
    config, result = collect(["experiment=twin", f"model.router.balancing={name}"])
    assert not result and not check(config, 8)
    groups = {each.group for each in BALANCING[name].collectives}
    assert groups <= set(used_kinds(config, layout_of(config, 8)))


def test_a_loss_without_weight_is_not_in_effect() -> None:
    assert [one.name for one in RouterConfig().balancing_methods] == ["aux"]
    assert not RouterConfig(aux_coeff=0.0).balancing_methods
    names = [m.name for m in RouterConfig(balancing="none", expert_bias=True).balancing_methods]
    assert names == ["expert_bias"]


def test_what_a_method_excludes_is_refused_by_name() -> None:
    for name, value in (("capacity_factor", "1.0"), ("groups", "2"), ("expert_bias", "true")):
        overrides = [f"model.router.{name}={value}", "model.router.balancing=sinkhorn"]
        config, _ = collect(["experiment=twin", "model.router.score=sigmoid", *overrides])
        assert f"model.router.{name}" in [fault.field for fault in check(config, 8)]
