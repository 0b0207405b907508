"""Every layout's curve equals the single process's, at the twin's size: 16 layers, 64 experts."""

from __future__ import annotations

import pytest

from moe_train.testing import layouts
from moe_train.testing.compare import compare, same_bits
from moe_train.testing.layouts import TWIN, Layout, Runs
from tests.support.document import document
from tests.train.test_parity_small import DOCS, HEAD, row

CONDITIONS = (
    "fp32, the twin (16 layers, 64 experts) as it is configured, 1024 tokens a step of the "
    "embedded corpus, 20 steps, CPU backend, against the single process with the same global "
    "batch."
)
pytestmark = [pytest.mark.world, pytest.mark.full, pytest.mark.timeout(3000)]


@pytest.fixture(scope="session")
def twin_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of the twin, each made once for all tests."""
    return Runs(tmp_path_factory.mktemp("twin"), TWIN, timeout=1400)


@pytest.mark.parametrize("layout", layouts.GRID, ids=lambda layout: layout.name)
def test_curve_equals_single_process(twin_runs: Runs, layout: Layout) -> None:
    result = compare(twin_runs.get(layout), twin_runs.get(layouts.SINGLE))
    assert len(result.steps) == 20
    document(DOCS, "The twin", CONDITIONS, "layout", HEAD)
    document(DOCS, "The twin", CONDITIONS, layout.name, row(layout, result))
    assert result.within(), f"{layout.name}\n{result}"


@pytest.mark.parametrize("recompute", ["reference", "all"])
@pytest.mark.parametrize("layout", [layouts.SINGLE, *layouts.GRID], ids=lambda layout: layout.name)
def test_recompute_changes_no_bit(twin_runs: Runs, layout: Layout, recompute: str) -> None:
    four = "train.steps=4"
    same_bits(twin_runs.new(layout, f"recompute={recompute}", four), twin_runs.get(layout, four))
