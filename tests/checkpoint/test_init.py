"""A new run with the weights of an earlier one: ``checkpoint.init``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_train.config.compose import compose
from moe_train.errors import EXIT_CHECKPOINT, ConfigFaults
from moe_train.testing import layouts
from moe_train.testing.compare import same_bits
from moe_train.testing.layouts import Layout, Runs
from moe_train.testing.runs import Run, train_run
from moe_train.testing.world import run_world
from tests.checkpoint.test_resume_bitwise import PRECISION_AWARE

SAVED_AT = 4
SAVING = (f"train.steps={SAVED_AT}", f"checkpoint.every={SAVED_AT}", "optim.decay_steps=20")
FRESH = ("train.steps=3", "optim.decay_steps=20")
BF16 = ("dtype=bf16",)
DISTRIBUTED_BF16 = Layout("DP2.EP2 bf16", 2, {"expert": 2}, (*layouts.DISTRIBUTED, *BF16))


def source(runs: Runs, layout: Layout = layouts.SINGLE, *extra: str) -> Run:
    """The run whose weights others start with."""
    return runs.get(layout, *SAVING, *extra)


def losses(run: Run) -> list[float]:
    """Of every step."""
    result: list[float] = run.column("loss")
    return result


@pytest.mark.world
def test_optimizer_schedule_and_data_begin_at_zero(small_runs: Runs) -> None:
    before = source(small_runs)
    run = small_runs.new(layouts.SINGLE, *FRESH, f"checkpoint.init={before.folder}")
    assert run.column("step") == [1, 2, 3]
    assert run.column("lr") == before.column("lr")[:3]
    assert run.column("consumed_samples") == [4, 8, 12]
    # The same first batch, seen by weights that have been trained.
    assert losses(run)[0] < losses(before)[0] - 0.1
    checkpoint = before.folder / "checkpoints" / f"step_{SAVED_AT:08d}"
    named = small_runs.new(layouts.SINGLE, *FRESH, f"checkpoint.init={checkpoint}")
    same_bits(run, named)


@pytest.mark.world
@pytest.mark.parametrize(
    "layout",
    [
        layouts.DP2_EP2_DISTRIBUTED,
        layouts.TP2_PP2_EP4_SPAN,
        pytest.param(layouts.TP2_PP2_EP2, marks=pytest.mark.full),
        pytest.param(layouts.PP2_V2, marks=pytest.mark.full),
        pytest.param(layouts.TP2_ETP2, marks=pytest.mark.full),
    ],
    ids=lambda layout: layout.name.replace(" ", "_"),
)
def test_every_layout_starts_with_the_same_weights(small_runs: Runs, layout: Layout) -> None:
    start = f"checkpoint.init={source(small_runs).folder}"
    here = small_runs.new(layout, *FRESH, start)
    there = small_runs.get(layouts.SINGLE, *FRESH, start)
    assert losses(here) == pytest.approx(losses(there), rel=1e-5)
    assert here.column("grad_norm") == pytest.approx(there.column("grad_norm"), rel=1e-4)


@pytest.mark.world
@pytest.mark.parametrize(
    "layout",
    [PRECISION_AWARE, pytest.param(DISTRIBUTED_BF16, marks=pytest.mark.full)],
    ids=lambda layout: layout.name.replace(" ", "_"),
)
def test_master_copies_are_the_weights(small_runs: Runs, layout: Layout) -> None:
    """The second step would fall back to the random masters, had they stayed."""
    before = source(small_runs, layouts.SINGLE, *BF16)
    start = f"checkpoint.init={before.folder}"
    here = small_runs.new(layout, *FRESH, start)
    there = small_runs.get(layouts.SINGLE, *BF16, *FRESH, start)
    assert losses(here) == pytest.approx(losses(there), rel=2e-3)
    assert max(losses(there)[1:]) < losses(before)[0] - 0.1


@pytest.mark.world
def test_a_resumed_run_does_not_start_again(small_runs: Runs, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source(small_runs).folder, copy)
    start = (f"checkpoint.init={copy}", "optim.decay_steps=20", "checkpoint.every=2")
    shutil.rmtree(small_runs.folder / "init_resumed", ignore_errors=True)
    small_runs.new(layouts.SINGLE, "train.steps=2", *start, name="init_resumed")
    # Nothing of it is needed any more.
    shutil.rmtree(copy)
    resumed = small_runs.new(layouts.SINGLE, "train.steps=4", *start, name="init_resumed")
    whole = small_runs.new(
        layouts.SINGLE,
        *("train.steps=4", "optim.decay_steps=20"),
        f"checkpoint.init={source(small_runs).folder}",
    )
    same_bits(resumed, whole)


def refused(tmp_path: Path, *overrides: str) -> str:
    run = train_run(tmp_path / "refused", [*layouts.SMALL, *overrides])
    assert run.codes == [EXIT_CHECKPOINT] and not run.records
    output = (tmp_path / "refused.log").read_text()
    assert "Traceback" not in output
    return output


@pytest.mark.world
def test_other_shapes_and_missing_weights_are_refused(small_runs: Runs, tmp_path: Path) -> None:
    start = f"checkpoint.init={source(small_runs).folder}"
    output = refused(tmp_path, start, "model.expert_hidden=64")
    assert "expert_hidden is 32 there and 64 here" in output
    assert "model.expert_hidden=32 fits it; without checkpoint.init" in output
    assert "of another model" in refused(tmp_path, start, "model.tied_embeddings=true")
    missing = tmp_path / "missing"
    assert str(missing) in refused(tmp_path, f"checkpoint.init={missing}")


def _damaged(rank: int, world: int, argv: list[str]) -> Any:
    from moe_train.cli import main

    return main(["train", *argv])


@pytest.mark.world
@pytest.mark.full
def test_a_damaged_checkpoint_is_refused_on_every_rank(small_runs: Runs, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source(small_runs).folder / "checkpoints" / f"step_{SAVED_AT:08d}", copy)
    [data] = copy.glob("__0_0.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    argv = [
        *layouts.SMALL,
        *layouts.EP2.overrides,
        *("device=cpu", f"run.dir={tmp_path}", "run.name=damaged", f"checkpoint.init={copy}"),
    ]
    assert run_world(_damaged, 2, argv) == [EXIT_CHECKPOINT] * 2


def test_it_does_not_go_with_a_resume_from_a_path() -> None:
    with pytest.raises(ConfigFaults, match=r"checkpoint\.init"):
        compose(["checkpoint.init=a", "checkpoint.resume=b"])
    assert compose(["checkpoint.init=a", "checkpoint.resume=never"]).checkpoint.init == "a"
