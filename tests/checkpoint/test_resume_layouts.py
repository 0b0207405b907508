"""A checkpoint goes on in any other layout, weights and optimizer alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.run_folder.metrics import read
from moe_train.testing import layouts
from moe_train.testing.compare import EARLY, compare
from moe_train.testing.layouts import SMALL, Layout, Runs
from moe_train.testing.runs import QUIET, Run, train_run
from moe_train.testing.world import run_world
from tests.support.carry import digests, rewrite
from tests.support.survival import FAULTY

pytestmark = pytest.mark.world
SAVED_AT, GOES_TO = 6, 9
SAVING = (f"train.steps={SAVED_AT}", "optim.decay_steps=20", f"checkpoint.every={SAVED_AT}")
GOES_ON = (f"train.steps={GOES_TO}", "optim.decay_steps=20")
CHECKPOINT = f"checkpoints/step_{SAVED_AT:08d}"


def saved(runs: Runs, layout: Layout) -> Path:
    """A checkpoint written in ``layout``, while the weights still move fast."""
    return runs.get(layout, *SAVING).folder / CHECKPOINT


def resumed(runs: Runs, checkpoint: Path, layout: Layout, *extra: str) -> Run:
    """Steps 7-9 in ``layout``."""
    return runs.new(layout, *GOES_ON, f"checkpoint.resume={checkpoint}", *extra)


MOVES = [
    (layouts.SINGLE, layouts.EP2),
    (layouts.EP2, layouts.SINGLE),
    (layouts.SINGLE, layouts.TP2_ETP2),
    (layouts.TP2_ETP2, layouts.PP2_V2),
    (layouts.EP2, layouts.DP2_EP2_DISTRIBUTED),
    (layouts.DP2_EP2_DISTRIBUTED, layouts.TP2_EP2),
    (layouts.DP2_DISTRIBUTED, layouts.TP2_PP2_EP2),
    (layouts.TP2_PP2_EP2, layouts.SINGLE),
    (layouts.SINGLE, layouts.PP2_EP2_SPAN),
    (layouts.PP2_EP2_SPAN, layouts.EP2),
    (layouts.EP2, layouts.TP2_PP2_EP4_SPAN),
    (layouts.TP2_PP2_EP4_SPAN, layouts.SINGLE),
]


DEFAULT_MOVES = (MOVES[3], MOVES[5], MOVES[6], MOVES[7], MOVES[9], MOVES[10])
"""Every dimension as source and as target."""
DEFAULT_LAYOUTS = (
    layouts.TP2_PP2_EP2,
    layouts.TP2_ETP2,
    layouts.DP2_EP2_DISTRIBUTED,
    layouts.PP2_V2,
    layouts.TP2_PP2_EP4_SPAN,
)


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(*m, marks=[] if m in DEFAULT_MOVES else pytest.mark.full) for m in MOVES],
    ids=lambda layout: layout.name.replace(" ", "_"),
)
def test_curve_goes_on_in_another_layout(small_runs: Runs, before: Layout, after: Layout) -> None:
    run = resumed(small_runs, saved(small_runs, before), after)
    assert run.column("step") == [7, 8, 9]
    # The narrow tolerance: the first steps after a resume are all that a lost state would show.
    result = compare(run, small_runs.get(layouts.SINGLE))
    assert result.within(late=EARLY), f"{before.name} -> {after.name}\n{result}"


def forgetful(rank: int, world: int, overrides: list[str], name: str) -> int:
    """Train, but lose one optimizer state (``exp_avg``, ``exp_avg_sq`` or ``step``) on loading."""
    from moe_train.checkpoint import load, optimizer_state
    from moe_train.checkpoint.shards import shards_of
    from moe_train.run.main import main

    read_state = load.read_state

    def lose(tree: Any, folder: Path, manifest: Any) -> None:
        first = next(shards_of(tree))
        if not first.sharded.key.startswith(f"optimizer.state.{name}."):
            read_state(tree, folder, manifest)

    load.read_state = lose
    if name == "step":
        optimizer_state.set_optimizer_step = lambda optimizer, step: None
    return main(overrides)


@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq", "step"])
def test_a_lost_optimizer_state_is_seen(small_runs: Runs, tmp_path: Path, lost: str) -> None:
    checkpoint = saved(small_runs, layouts.SINGLE)
    overrides = [*QUIET, *SMALL, *GOES_ON, f"checkpoint.resume={checkpoint}"]
    overrides += [f"run.dir={tmp_path}", "run.name=lost"]
    assert run_world(forgetful, 1, overrides, lost) == [0]
    run = Run([0], tmp_path / "lost", read(tmp_path / "lost" / "metrics.jsonl"))
    assert run.column("step") == [7, 8, 9]
    result = compare(run, small_runs.get(layouts.SINGLE))
    assert not result.within(), f"losing {lost} passes unseen\n{result}"


def carry(root: Path, checkpoint: Path, layout: Layout, *extra: str) -> Path:
    """``checkpoint``, loaded and saved by ``layout``'s ranks."""
    target = root / layout.name.replace(" ", "_")
    overrides = [*SMALL, *layout.overrides, *extra]
    return Path(run_world(rewrite, layout.world, overrides, str(checkpoint), str(target))[0])


def contents(*checkpoints: Path) -> list[dict[str, str]]:
    """Digests of all their tensors."""
    result: list[dict[str, str]] = run_world(digests, 1, [str(path) for path in checkpoints])[0]
    return result


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(one, marks=[] if one in DEFAULT_LAYOUTS else pytest.mark.full)
        for one in (*layouts.GRID, layouts.DP2_DISTRIBUTED)
    ],
    ids=lambda layout: layout.name.replace(" ", "_"),
)
def test_loading_and_saving_changes_no_bit(
    small_runs: Runs, tmp_path: Path, layout: Layout
) -> None:
    source = saved(small_runs, layouts.SINGLE)
    extra = ["batch.global=8"] if layout.world == 8 else []
    before, after = contents(source, carry(tmp_path, source, layout, *extra))
    # Weights of attention, experts, norms, router, embedding and head, and two moments of each.
    assert len(before) >= 3 * 10
    assert sum(key.startswith("optimizer.state.exp_avg_sq.") for key in before) == len(before) // 3
    assert after == before, differing(after, before)


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of tensors that are not the same."""
    return sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))


LOW = ("dtype=bf16",)
AWARE = (*LOW, "optim.distributed=true", "optim.precision_aware=true", "optim.moment_dtype=bf16")


def test_bf16_and_precision_aware_state_carries_over(small_runs: Runs, tmp_path: Path) -> None:
    trained = Layout("EP2 aware", 2, {"expert": 2}, AWARE)
    first = saved(small_runs, trained)
    way = [first]
    for layout in (
        Layout("single aware", 1, {}, AWARE),
        Layout("TP2.PP2.EP2 plain bf16", 4, layouts.TP2_PP2_EP2.sizes, LOW),
        Layout("DP2 aware", 2, {}, AWARE),
    ):
        way.append(carry(tmp_path, way[-1], layout))
    before, *after = contents(*way)
    assert any(key.startswith("optimizer.state.param.") for key in before), "no master weights"
    for path, tensors in zip(way[1:], after, strict=True):
        assert tensors == before, f"{path.parent.name} changed {differing(tensors, before)}"


def test_another_number_of_replicas_and_with_it_another_batch_is_told(tmp_path: Path) -> None:
    overrides = [*FAULTY, "batch.global=null", "batch.microbatches=2", "batch.accumulation=1"]
    first = train_run(tmp_path / "run", [*overrides, "train.steps=2"], 1)
    assert first.codes == [0]
    log = (tmp_path / "run").with_suffix(".log")
    assert "warning" not in log.read_text()
    again = train_run(tmp_path / "run", [*overrides, "train.steps=3", "parallel.expert=2"], 2)
    assert again.codes == [0, 0]
    [output] = [line for line in log.read_text().splitlines() if line.startswith("warning")]
    assert "4 sequences from here on and had 2 until now" in output and "batch.global=2" in output


def test_other_samples_are_told(tmp_path: Path) -> None:
    overrides = [*FAULTY, "batch.global=2"]
    assert train_run(tmp_path / "run", [*overrides, "train.steps=2"], 1).codes == [0]
    more = ("train.steps=3", "data.sequence=32", "run.seed=7")
    assert train_run(tmp_path / "run", [*overrides, *more], 1).codes == [0]
    lines = (tmp_path / "run").with_suffix(".log").read_text().splitlines()
    [output] = [line for line in lines if line.startswith("warning")]
    assert "data.sequence=32, not 16 and run.seed=7, not " in output
