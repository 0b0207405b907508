"""``moe-train tune --prove`` and ``--measure``: real peaks, the order of runs, the refit."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from moe_train.cli import main
from moe_train.config.compose import compose
from moe_train.errors import ConfigError
from moe_train.measure.trials import (
    ROUNDS,
    groups,
    launched,
    measure,
    predicted,
    refit,
    trials_report,
)
from moe_train.planner.search import Candidate, candidates
from moe_train.planner.search.candidate import OPTIONS

ALLOWED = 0.05
"""Difference of a predicted peak that is promised."""
SMALL = [
    "experiment=twin", "parallel=auto", "parallel.reference=", "recompute=none", "device=cpu",
    "model.layers=4", "model.experts=8", "model.hidden=128", "model.expert_hidden=64",
    "data.sequence=128", "batch.global=16",
]  # fmt: skip
FIXED = [
    "batch.micro=1", "recompute.layers=none", "recompute.modules=[]",
    "parallel.dispatcher=alltoall",
    "parallel.overlap_expert_comm=false", "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=false", "optim.distributed=false",
]  # fmt: skip
"""Options that do not vary, so that a layout is a candidate."""


SLOW = {"communication": 8.0}
"""Factors of a machine whose exchanges take eight times as long as predicted."""


@pytest.fixture(scope="module")
def pool() -> list[Candidate]:
    return candidates(compose(SMALL), 4, fixed=OPTIONS, count=12)


def lines(candidate: Candidate) -> list[str]:
    return candidate.overrides(compose(SMALL))


def test_a_refit_finds_the_factors_that_made_the_times(pool: Sequence[Candidate]) -> None:
    sums = [groups(one) for one in pool]
    true = {"compute": 1.5, "communication": 3.0, "waiting": 0.7, "other": 1.0}
    runs = [(one, predicted(one, true)) for one in sums]
    assert refit([]) == {}
    before = max(abs(sum(one.values()) / seconds - 1) for one, seconds in runs)
    after = max(abs(predicted(one, refit(runs)) / seconds - 1) for one, seconds in runs)
    assert before > 0.5 and after < 0.05
    order = sorted(range(len(runs)), key=lambda i: runs[i][1])
    fitted = refit(runs)
    assert order[0] == min(range(len(runs)), key=lambda i: predicted(sums[i], fitted))


def test_each_run_decides_the_next_one(pool: Sequence[Candidate], tmp_path: Path) -> None:
    """Where exchanges are slow, layouts with little of it are tried."""
    chance, ran = random.Random(1), []

    def run(candidate: Candidate, folder: Path) -> list[float]:
        ran.append(candidate.layout.tag)
        sums = groups(candidate)
        seconds = predicted(sums, SLOW)
        return [seconds * chance.uniform(0.97, 1.03) for _ in range(5)]

    trials = measure(pool, 3, tmp_path, run)
    assert len(ran) == 3 * ROUNDS and ran[:3] == ran[3:6] == ran[6:]
    assert [one.median for one in trials] == sorted(one.median for one in trials)
    # The first choice by predicted time is not the fastest here, and the runs say so.
    assert trials[0].median < 0.8 * predicted(groups(pool[0]), SLOW)
    report = trials_report(trials, pool, lines)
    off = {"predicted_seconds": 0.0, "refitted_seconds": 0.0}
    for name, row in product(off, report["trials"]):
        off[name] += abs(row[name] / row["median_seconds"] - 1)
    assert off["refitted_seconds"] < off["predicted_seconds"] / 2
    left = [one for one in pool if one.layout.tag not in ran]
    assert report["unmeasured"]["refitted_seconds"] == pytest.approx(
        min(predicted(groups(one), report["factors"]) for one in left)
    )


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    [one] = candidates(compose(SMALL), 1, fixed=OPTIONS, count=1)
    run = launched([*SMALL, "optim.lr=-1"], lines)
    with pytest.raises(ConfigError, match="does not run here"):
        run(one, tmp_path / "failed")


def test_the_predicted_peak_is_the_real_one(tmp_path: Path) -> None:
    """In a process of its own: a host is prepared for Megatron before anything imports it."""
    target = tmp_path / "tune.json"
    fixed = ["parallel.context=1", "parallel.expert_tensor=1", "parallel.placement=stage"]
    command = [sys.executable, "-m", "moe_train.cli", "tune", "experiment=moe_30b_8x64gb", *fixed,
               "--world", "8", "--prove", "2", "--json", str(target)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    proofs = json.loads(target.read_text())["proofs"]
    assert len(proofs) == 2
    for proof in proofs:
        assert not proof["skipped"] and proof["peak_bytes"] > 30e9
        assert abs(proof["difference"]) <= ALLOWED
        assert proof["layout"] in done.stdout


@pytest.mark.full
@pytest.mark.world
@pytest.mark.timeout(3600)
def test_measured_trials_choose_a_fast_layout(tmp_path: Path) -> None:
    """Twelve layouts on four CPU ranks, in turn three times; three trials choose one of the
    fastest.
    """
    overrides = [*SMALL, *FIXED]
    every = candidates(compose(overrides), 4, fixed=OPTIONS, count=12)
    run = launched(overrides, lines)
    seconds: dict[str, list[float]] = {one.layout.tag: [] for one in every}
    for number in range(3):
        for index, one in enumerate(every):
            seconds[one.layout.tag] += run(one, tmp_path / f"all_{number}_{index}")
    medians = {tag: statistics.median(times) for tag, times in seconds.items()}
    target = tmp_path / "tune.json"
    arguments = ["--world", "4", "--top", "12", "--measure", "3", "--json", str(target)]
    assert main(["tune", *overrides, *arguments]) == 0
    measured: dict[str, Any] = json.loads(target.read_text())["measured"]
    chosen = measured["trials"][0]["layout"]
    print(json.dumps({"medians": medians, "chosen": chosen, "measured": measured}, indent=1))
    assert medians[chosen] <= 1.05 * min(medians.values()), medians
