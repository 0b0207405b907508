"""A run that stops and goes on is the run that never stopped, bit by bit."""

from __future__ import annotations

import shutil

import pytest

from moe_train.testing import layouts
from moe_train.testing.compare import same_bits
from moe_train.testing.layouts import Layout, Runs
from moe_train.testing.runs import Run

pytestmark = pytest.mark.world
PRECISION_AWARE = Layout(
    "DP2.EP2 precision-aware",
    2,
    {"expert": 2},
    (
        "dtype=bf16",
        "optim.distributed=true",
        "optim.precision_aware=true",
        "optim.moment_dtype=bf16",
    ),
)
WHOLE = ("train.steps=12", "optim.decay_steps=20")


def stopped_and_continued(runs: Runs, layout: Layout, at: int, to: int) -> Run:
    """One run folder: ``at`` steps, then a fresh world that goes on to step ``to``."""
    name = f"resume_{layout.name.replace(' ', '_')}"
    shutil.rmtree(runs.folder / name, ignore_errors=True)
    keep = ("optim.decay_steps=20", f"checkpoint.every={at}", "checkpoint.resume=auto")
    first = runs.new(layout, f"train.steps={at}", *keep, name=name)
    assert first.column("step") == list(range(1, at + 1))
    return runs.new(layout, f"train.steps={to}", *keep, name=name)


@pytest.mark.parametrize(
    "layout", [layouts.SINGLE, layouts.TP2_PP2_EP2], ids=lambda layout: layout.name
)
def test_twenty_steps_equal_ten_and_ten(small_runs: Runs, layout: Layout) -> None:
    run = stopped_and_continued(small_runs, layout, 10, 20)
    assert run.column("step") == list(range(1, 21)), "a step is missing or told twice"
    assert run.column("consumed_samples") == [4 * step for step in range(1, 21)]
    # The first ten come from a separate world of the same layout: they must not differ either.
    same_bits(run, small_runs.get(layout))


def test_precision_aware_optimizer_resumes_bitwise(small_runs: Runs) -> None:
    run = stopped_and_continued(small_runs, PRECISION_AWARE, 6, 12)
    same_bits(run, small_runs.get(PRECISION_AWARE, *WHOLE))
