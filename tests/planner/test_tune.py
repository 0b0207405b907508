"""``moe-train tune``: its report, what it fixes, and what it says where nothing fits."""

from __future__ import annotations

import json
from typing import Any

import pytest

import moe_train
from moe_train.cli import main
from moe_train.errors import EXIT_CONFIG, ConfigFaults
from moe_train.parallel.layout import Layout
from moe_train.planner.cost.timing import step_time
from moe_train.planner.plan import BAND, Plan
from moe_train.planner.resolution import resolve_run
from moe_train.planner.search.terms import separation, step_terms

REFERENCE = ["experiment=moe_30b_8x64gb", "parallel.context=1", "parallel.expert_tensor=1"]
"""Two dimensions fixed: the search is a fraction of the whole."""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return moe_train.tune(REFERENCE, world=8)


def test_every_candidate_is_what_its_overrides_resolve_to(report: dict[str, Any]) -> None:
    assert len(report["top"]) == 5
    for row in (*report["top"], *report["pareto"]):
        plan = Plan.of(resolve_run([*REFERENCE, *row["overrides"]], 8))
        assert plan.layout.tag == row["layout"]
        assert plan.tokens == report["tokens_per_step"]
        assert step_time(plan).step == pytest.approx(row["step_seconds"])
        assert sum(row["terms"].values()) == pytest.approx(row["step_seconds"])


def test_the_first_is_the_fastest_and_the_frontier_trades_time_for_memory(
    report: dict[str, Any],
) -> None:
    times = [row["step_seconds"] for row in report["top"]]
    assert times == sorted(times)
    assert all(row["memory_share"] <= report["preferred_memory_share"] for row in report["top"])
    for faster, slower in zip(report["pareto"], report["pareto"][1:], strict=False):
        assert faster["step_seconds"] < slower["step_seconds"]
        assert faster["memory_bytes"] > slower["memory_bytes"]


def test_the_layout_asked_for_is_explained(report: dict[str, Any]) -> None:
    given, first = report["requested"], report["top"][0]
    assert given["layout"] == "TP2.PP4.EP8.span" and given["verdict"] == "slower"
    assert given["step_seconds"] * (1 - BAND) > first["step_seconds"]
    gaps = {
        name: seconds - first["terms"].get(name, 0.0) for name, seconds in given["terms"].items()
    }
    term = max(gaps, key=lambda name: gaps[name])
    assert given["separated_by"]["term"].startswith(term) and term in given["reason"]
    assert given["separated_by"]["seconds"] == pytest.approx(gaps[term])


def test_a_term_separates_both_ways() -> None:
    """A pipeline without recomputation against one with: the same term, by sign."""
    both = [
        Plan.of(resolve_run(["experiment=moe_30b_8x64gb", f"recompute={name}"], 8))
        for name in ("none", "all")
    ]
    terms = [step_terms(plan, step_time(plan)) for plan in both]
    slower = separation(both[1], terms[1], both[0], terms[0])
    faster = separation(both[0], terms[0], both[1], terms[1])
    assert slower.term == faster.term == "recomputation"
    assert slower.seconds == -faster.seconds > 0
    exchange = ["experiment=moe_30b_8x64gb", "parallel.overlap_expert_comm=true"]
    hidden = Plan.of(resolve_run(exchange, 8))
    apart = separation(both[1], terms[1], hidden, step_terms(hidden, step_time(hidden)))
    assert apart.term == "expert exchange between nodes"


def test_what_is_refused_is_searched_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """An illegal layout says what is wrong; keys set by themselves stay."""
    overrides = [
        *(*REFERENCE, "parallel=tp2_pp4_ep8", "parallel.placement=stage"),
        *("parallel.tensor=2", "batch.global=32", "batch.micro=1"),
    ]
    assert main(["tune", *overrides, "--world", "8", "--top", "2", "--json", "-"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert "world size" in output["requested"]["reason"]
    for row in output["top"]:
        layout = Layout.from_tag(row["layout"])
        assert layout is not None and layout.tensor == 2 and not layout.span
        assert row["options"]["batch.micro"] == 1


def test_where_nothing_fits_it_says_what_would() -> None:
    fixed = ["parallel.placement=stage", "parallel.virtual_pipeline=1", "batch.micro=1"]
    report = moe_train.tune([*REFERENCE, *fixed, "hardware=l4_24gb"], world=8, count=1)
    assert not report["fits"] and report["pareto"] == []
    assert any("ranks" in line for line in report["remedies"])
    size = next(line for line in report["remedies"] if line.startswith("devices of"))
    more = [*REFERENCE, *fixed, "hardware=l4_24gb", f"hardware.memory_gb={size.split()[2]}"]
    assert moe_train.tune(more, world=8, count=1)["fits"]


def test_a_fault_of_a_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigFaults):
        moe_train.tune(["model.hidden=-1"])
    assert main(["tune", "experiment=twin", "--top", "0"]) == EXIT_CONFIG
    assert "--top" in capsys.readouterr().err
