"""The non-finite gate: all ranks stop together, before any weight has changed."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.errors import EXIT_NON_FINITE
from moe_train.testing.runs import QUIET
from moe_train.testing.world import run_world
from tests.support.engines import micro_batches, open_engine, shards

SMALL = [
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.experts=4"),
    *("model.expert_hidden=24", "data.sequence=16", "recompute=none", "parallel=single"),
    *("batch.global=8", "batch.micro=1"),
    *("checkpoint.every=0", "train.eval_every=0", "train.steps=3"),
]


EXPERT_BIAS = ["model.router.score=sigmoid", "model.router.expert_bias=true"]


def _poison(engine: Any, value: float) -> Any:
    """Until the hook is removed this rank's backward pass spoils one entry of one gradient."""
    import torch

    weight = next(p for n, p in engine.chunks[0].named_parameters() if "linear_proj" in n)
    spoilt = torch.zeros_like(weight)
    spoilt.view(-1)[0] = value

    return weight.register_hook(lambda gradient: gradient + spoilt)


def _step(rank: int, world: int, layout: list[str], value: float) -> Any:
    from moe_train.train.step import train_step

    engine = open_engine(rank, world, [*SMALL, "model.vocab=256", *layout], 256)
    tokens = np.random.default_rng(0).integers(0, 256, (8, 17))
    train_step(engine, micro_batches(engine, tokens), 1)
    before = [s.data for s in shards(engine)]
    if rank == 1:
        _poison(engine, value)
    result = train_step(engine, micro_batches(engine, tokens), 2)
    same = all(np.array_equal(a, s.data) for a, s in zip(before, shards(engine), strict=True))
    return result.applied, float(result.loss).hex(), float(result.grad_norm).hex(), same


@pytest.mark.world
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "layout",
    [[], ["parallel.pipeline=2"], ["optim.distributed=true"], EXPERT_BIAS],
    ids=["dp2", "pp2", "dp2-distributed", "dp2-expert-bias"],
)
def test_one_bad_gradient_stops_all_ranks(layout: list[str], value: float) -> None:
    answers = run_world(_step, 2, layout, value)
    assert [applied for applied, *_ in answers] == [False, False]
    assert len(set(answers)) == 1, "all ranks have the same loss and norm"
    assert all(same for *_, same in answers), "a weight moved"


@pytest.mark.world
def test_a_finite_step_does_move_weights() -> None:
    """The check above would see a change."""
    for applied, _, _, same in run_world(_step, 2, [], 0.0):
        assert applied and not same


def _program(
    rank: int, world: int, overrides: list[str], spoil_from: int, times: int = 1000
) -> Any:
    """train.py with a gradient that rank 1 spoils from step `spoil_from` on, so many times."""
    from moe_train.run.main import main
    from moe_train.train import loop

    plain = loop.train_step

    left = [times]

    def step(engine: Any, batches: Any, number: int, **how: Any) -> Any:
        hook = None
        if rank == 1 and number >= spoil_from and left[0]:
            left[0] -= 1
            hook = _poison(engine, float("nan"))
        try:
            return plain(engine, batches, number, **how)
        finally:
            if hook is not None:
                hook.remove()

    loop.train_step = step
    code = main(overrides)
    return code, [child.name for child in multiprocessing.active_children()]


@pytest.mark.world
def test_the_run_fails_with_its_code_and_says_so(tmp_path: Path) -> None:
    named = [f"run.dir={tmp_path}", "run.name=gate"]
    ranks = run_world(_program, 2, [*QUIET, *SMALL, *named], 3)
    assert [code for code, _ in ranks] == [EXIT_NON_FINITE, EXIT_NON_FINITE]
    status = json.loads((tmp_path / "gate" / "status.json").read_text())
    assert status["state"] == "failed" and status["step"] == 2
    assert "nan" in status["reason"]
    lines = (tmp_path / "gate" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.mark.world
def test_saving_leaves_no_process_behind(tmp_path: Path) -> None:
    named = [f"run.dir={tmp_path}", "run.name=save", "checkpoint.every=1", "train.steps=1"]
    ranks = run_world(_program, 2, [*QUIET, *SMALL, *named], 9)
    assert ranks == [(0, []), (0, [])]
    assert list((tmp_path / "save" / "checkpoints").glob("step_00000001"))


SIX = ["train.steps=6", "checkpoint.every=2", "optim.warmup_steps=0"]


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.world
def test_a_skipped_step_is_counted_and_changes_no_weight(tmp_path: Path) -> None:
    named = [f"run.dir={tmp_path}", "run.name=skip", "train.non_finite=skip"]
    ranks = run_world(_program, 2, [*QUIET, *SMALL, *SIX, *named], 3, 1)
    assert [code for code, _ in ranks] == [0, 0]
    lines = _lines(tmp_path / "skip")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if line.get("skipped")] == [3]
    assert lines[2]["grad_norm"] is None and lines[2]["grad_norm_hex"] == "nan"
    assert all(line["grad_norm"] is not None for line in lines if not line.get("skipped"))


@pytest.mark.world
def test_rolling_back_gives_the_undisturbed_curve(tmp_path: Path) -> None:
    overrides = [*QUIET, *SMALL, *SIX, f"run.dir={tmp_path}", "train.non_finite=rollback"]
    for name, times in (("calm", 0), ("back", 1)):
        ranks = run_world(_program, 2, [*overrides, f"run.name={name}"], 4, times)
        assert [code for code, _ in ranks] == [0, 0]
    calm, back = _lines(tmp_path / "calm"), _lines(tmp_path / "back")
    assert [line["step"] for line in back] == [1, 2, 3, 4, 5, 6]
    for name in ("loss_hex", "grad_norm_hex", "consumed_samples"):
        assert [line[name] for line in back] == [line[name] for line in calm]


@pytest.mark.world
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_many_are_too_many(tmp_path: Path, policy: str) -> None:
    overrides = [f"run.dir={tmp_path}", "run.name=many", f"train.non_finite={policy}"]
    overrides += ["train.non_finite_limit=2"]
    ranks = run_world(_program, 2, [*QUIET, *SMALL, *SIX, *overrides], 3)
    assert [code for code, _ in ranks] == [EXIT_NON_FINITE, EXIT_NON_FINITE]
    status = json.loads((tmp_path / "many" / "status.json").read_text())
    assert status["state"] == "failed" and status["step"] == (4 if policy == "skip" else 2)
    assert f"exceeded train.non_finite_limit=2 (train.non_finite={policy})" in status["reason"]


@pytest.mark.world
def test_rolling_back_needs_a_checkpoint(tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}", "run.name=none", "train.non_finite=rollback"]
    ranks = run_world(_program, 2, [*QUIET, *SMALL, *SIX, *overrides], 1)
    assert [code for code, _ in ranks] == [EXIT_NON_FINITE, EXIT_NON_FINITE]
    status = json.loads((tmp_path / "none" / "status.json").read_text())
    assert "no checkpoint yet" in status["reason"]
