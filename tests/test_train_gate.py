"""The non-finite gate: all ranks stop together, before any weight has changed."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.errors import EXIT_NON_FINITE
from moe_train.testing.engines import micro_batches, open_engine, shards
from moe_train.testing.runs import QUIET
from moe_train.testing.world import run_world

SMALL = [
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.experts=4"),
    *("model.expert_hidden=24", "data.sequence=16", "recompute=none", "parallel=single"),
    *("batch.global=8", "batch.micro=1"),
    *("checkpoint.every=0", "train.eval_every=0", "train.steps=3"),
]


def _poison(engine: Any, value: float) -> None:
    """From now on this rank's backward pass spoils one entry of one gradient."""
    import torch

    weight = next(p for n, p in engine.chunks[0].named_parameters() if "linear_proj" in n)
    spoilt = torch.zeros_like(weight)
    spoilt.view(-1)[0] = value

    weight.register_hook(lambda gradient: gradient + spoilt)


def _step(rank: int, world: int, layout: list[str], value: float) -> Any:
    from moe_train.errors import NonFiniteError
    from moe_train.train.step import train_step

    engine = open_engine(rank, world, [*SMALL, "model.vocab=256", *layout], 256)
    tokens = np.random.default_rng(0).integers(0, 256, (8, 17))
    train_step(engine, micro_batches(engine, tokens), 1)
    before = [s.data for s in shards(engine)]
    if rank == 1:
        _poison(engine, value)
    try:
        train_step(engine, micro_batches(engine, tokens), 2)
        told = ""
    except NonFiniteError as fault:
        told = str(fault)
    same = all(np.array_equal(a, s.data) for a, s in zip(before, shards(engine), strict=True))
    return told, same


@pytest.mark.world
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "layout",
    [[], ["parallel.pipeline=2"], ["optim.distributed=true"]],
    ids=["dp2", "pp2", "dp2-distributed"],
)
def test_one_bad_gradient_stops_all_ranks(layout: list[str], value: float) -> None:
    answers = run_world(_step, 2, layout, value)
    assert [bool(told) for told, _ in answers] == [True, True]
    assert len({told for told, _ in answers}) == 1
    assert "step 2" in answers[0][0]
    assert all(same for _, same in answers), "a weight moved"


@pytest.mark.world
def test_a_finite_step_does_move_weights() -> None:
    """The check above would see a change."""
    assert run_world(_step, 2, [], 0.0) == [("", False), ("", False)]


def _program(rank: int, world: int, overrides: list[str], spoil_from: int) -> Any:
    """train.py with a gradient that rank 1 spoils at step `spoil_from`."""
    from moe_train.runtime import main
    from moe_train.train import loop

    plain = loop.train_step

    def step(engine: Any, batches: Any, number: int) -> Any:
        if rank == 1 and number == spoil_from:
            _poison(engine, float("nan"))
        return plain(engine, batches, number)

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
