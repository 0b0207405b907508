"""Every layout's curve equals the single process's, at a size for every commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.testing import layouts
from moe_train.testing.compare import EARLY, Difference, compare, expert_tokens, same_bits
from moe_train.testing.layouts import SMALL, Layout, Runs
from moe_train.testing.world import run_world
from tests.support.document import document

DOCS = Path(__file__).parents[2] / "docs" / "parity.md"
CONDITIONS = (
    "fp32, 4 layers, 8 experts, 256 tokens a step of the embedded corpus, 20 steps, CPU backend, "
    "against the single process with the same global batch."
)
HEAD = [
    "ranks",
    "loss, steps 1-6",
    "gradient norm, 1-6",
    "loss, 7-20",
    "gradient norm, 7-20",
    "moved, all steps",
]
pytestmark = pytest.mark.world


def row(layout: Layout, difference: Difference) -> list[str]:
    """Cells of the parity table."""
    pairs = [(name, early) for early in (True, False) for name in ("loss", "grad_norm")]
    measured = [f"{difference.worst(name, early):.1e}" for name, early in pairs]
    return [str(layout.world), *measured, str(sum(difference.moved or [0]))]


# Each dimension once, and each that others depend on together with them; the layouts that these
# contain are in the long grid. EP8 needs a global batch of 8: it is in the grid of the twin.
DEFAULT = (
    layouts.TP2_PP2_EP2,
    layouts.TP2_ETP2,
    layouts.DP2_EP2_DISTRIBUTED,
    layouts.PP2_V2,
    layouts.TP2_PP2_EP4_SPAN,
)
SMALL_GRID = [
    pytest.param(layout, marks=[] if layout in DEFAULT else [pytest.mark.full], id=layout.name)
    for layout in layouts.GRID
    if layout is not layouts.EP8
]


@pytest.mark.parametrize("layout", SMALL_GRID)
def test_curve_equals_single_process(small_runs: Runs, layout: Layout) -> None:
    result = compare(small_runs.get(layout), small_runs.get(layouts.SINGLE))
    assert len(result.steps) == 20
    document(DOCS, "A small model", CONDITIONS, "layout", HEAD)
    document(DOCS, "A small model", CONDITIONS, layout.name, row(layout, result))
    assert result.within(), f"{layout.name}\n{result}"


def test_loss_falls_so_that_curves_say_something(small_runs: Runs) -> None:
    loss = small_runs.get(layouts.SINGLE).column("loss")
    assert loss[-1] < loss[0] - 0.3
    tokens_TLE = np.stack(list(expert_tokens(small_runs.get(layouts.SINGLE)).values()))
    assert tokens_TLE.shape == (20, 4, 8)
    # 256 tokens x top-2 in every layer, and uneven: routing is really decided.
    assert (tokens_TLE.sum(axis=2) == 512).all() and tokens_TLE.std(axis=2).min() > 0


@pytest.mark.parametrize(
    "layout", [layouts.SINGLE, layouts.TP2_PP2_EP2], ids=lambda layout: layout.name
)
def test_recompute_changes_no_bit(small_runs: Runs, layout: Layout) -> None:
    four = ("train.steps=4", "optim.decay_steps=20")
    same_bits(small_runs.get(layout, "recompute=all", *four), small_runs.get(layout))


def test_another_seed_is_far_outside_the_tolerance(small_runs: Runs) -> None:
    other = small_runs.get(layouts.SINGLE, "run.seed=7", "train.steps=2", "optim.decay_steps=20")
    result = compare(other, small_runs.get(layouts.SINGLE))
    assert not result.within()
    assert result.worst("grad_norm", early=True) > 100 * EARLY[1]


OVERLAP = Layout(
    "PP2.EP2 with 2 virtual stages",
    4,
    {"pipeline": 2, "expert": 2, "virtual_pipeline": 2},
    ("dtype=bf16", "train.steps=6"),
)


def test_overlapped_expert_communication_changes_no_bit(small_runs: Runs) -> None:
    plain = small_runs.get(OVERLAP)
    same_bits(small_runs.get(OVERLAP, "parallel.overlap_expert_comm=true"), plain)


def plans_built(rank: int, world: int, overrides: list[str]) -> int:
    """How often combined 1F1B asked this rank's chunks for a plan in one step."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from tests.support.schedules import record_step

    plain, built = GPTModel.build_schedule_plan, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        built.append(1)
        return plain(*args, **kwargs)

    GPTModel.build_schedule_plan = counted
    record_step(rank, world, overrides)
    return len(built)


def test_overlap_really_takes_the_combined_schedule() -> None:
    overrides = [*SMALL, *OVERLAP.overrides, "train.steps=1"]
    # 2 micro-batches a replica, on 2 chunks.
    assert run_world(plans_built, 4, [*overrides, "parallel.overlap_expert_comm=true"]) == [4] * 4
    assert run_world(plans_built, 4, overrides) == [0] * 4
