"""The published runs: what the data must say, and how well predictions agree with them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest

from benchmarks.published.__main__ import main, mean_left_out
from benchmarks.published.fit import fit, residuals, start
from benchmarks.published.page import PAGE, page
from benchmarks.published.predict import overrides, published_seconds, rate, resolved
from benchmarks.published.rows import entries, entry, models, scored
from benchmarks.published.score import Comparison, compare, pairs, score
from moe_train.planner.cost import constants as cost

STATED = {
    # Rows whose sources state tokens per second and TFLOP/s of the same run.
    "zoo-dsv3": 368, "bridge-dsv3": 338, "bridge-dsv3-b200": 732, "bridge-dsv3-gb200": 1106,
    "bridge-dsv3-gb200-bf16": 782, "held-moonlight": 386.59, "held-dsv3-bf16": 276.03,
    "bridge-30b-pp2": 208, "bridge-30b-drop": 241, "bridge-30b-ep16-bf16": 244.039,
    "bridge-235b": 253, "bridge-235b-b200": 560,
}  # fmt: skip


@pytest.fixture(scope="module")
def compared() -> list[Comparison]:
    return compare()


def test_rows_say_where_they_stand():
    for one in entries():
        assert one.run.place and one.source.document
        assert one.run.unit != "mfu" or one.run.peak_tflops
        assert one.run.dtype != "fp8" or one.run.fp8_recipe
    assert {one.run.model for one in entries()} == set(models())


def test_predictions_agree_with_published_runs(compared):
    whole = score(compared)
    assert whole.rows >= 20
    assert whole.models >= 6
    assert len(cost.BOUNDS) <= 8
    assert {one.name for one in fields(cost.Constants)} == set(cost.BOUNDS)
    assert whole.mean <= 0.15
    assert whole.worst <= 0.35, whole.worst_row
    assert whole.order >= 0.85
    assert mean_left_out() <= 0.20


def test_rows_that_were_never_fitted_are_within_the_same_bounds(compared):
    held = [one for one in compared if one.entry.run.held_out]
    assert len(held) >= 3
    assert max(one.error for one in held) <= 0.35
    assert sum(one.error for one in held) / len(held) <= 0.20


@pytest.mark.parametrize("name", STATED)
def test_operations_are_counted_as_the_sources_count_them(name):
    one = entry(name)
    assert rate(one, published_seconds(one)) == pytest.approx(STATED[name], rel=0.01)


def test_rates_and_seconds_of_one_source_agree():
    both = [one for one in entries() if one.run.seconds]
    assert len(both) >= 4
    for one in both:
        assert published_seconds(one) == pytest.approx(one.run.seconds, rel=0.01)


def test_a_row_is_a_plan_that_anybody_can_ask_for():
    one = entry("zoo-235b-ep32-overlap")
    assert "parallel.overlap_expert_comm=true" in overrides(one)
    assert resolved(one.run.id).layout.tag == "TP2.PP8.VPP4.EP32"


def test_errors_are_the_same_in_both_directions():
    one = entry("zoo-8x22b")
    fast, slow = Comparison(one, 2.0, 1.0), Comparison(one, 1.0, 2.0)
    assert fast.error == slow.error == pytest.approx(1.0)
    order = pairs([fast, slow])
    assert [right for _, _, right in order] == [False]


def test_a_fit_is_no_worse_than_its_start():
    rows = [entry(name) for name in ("folding-8x22b-128", "zoo-235b-ep32", "bridge-30b-pp2")]
    after = residuals(rows, fit(rows))
    assert abs(after).mean() <= abs(residuals(rows, start())).mean()


def test_the_page_is_current(compared):
    assert PAGE.read_text() == page(compared, mean_left_out()), (
        "python -m benchmarks.published --write"
    )


def test_the_command_writes_json(capsys):
    main(["--json", "-"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["score"]["rows"] == len(scored())
    assert {"published_tflops", "predicted_tflops", "error", "source"} <= set(answer["runs"][0])


def test_the_command_imports_no_torch():
    code = "import sys, benchmarks.published.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
