"""A run told to stop: all ranks at one step, with everything saved, and on it goes bit by bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from moe_train.checkpoint.folders import committed
from moe_train.errors import EXIT_PREEMPTED
from moe_train.run.shutdown_budget import LAUNCHED, TIMEOUT, ShutdownBudget, grace_seconds
from moe_train.run_folder.metrics import read
from moe_train.run_folder.status import read_status
from moe_train.testing.layouts import TP2_PP2_EP2
from moe_train.testing.runs import train_run
from moe_train.testing.world import run_world
from tests.support.faults import LAUNCHER, Fault, codes, done
from tests.support.survival import FAULTY, Reference, assert_same_curve, hit, launch, notes, refer

pytestmark = pytest.mark.world

TERM, STEPS, WORLD = signal.SIGTERM, 6, 4
WORDS = [
    *FAULTY,
    *TP2_PP2_EP2.overrides,
    *("train.steps=6", "checkpoint.every=2", "checkpoint.keep=1"),
    *("train.eval_every=2", "train.eval_batches=2"),
]
# What happens, the step that the ranks agree on, and whether it is in the default suite.
STOPS: dict[str, tuple[list[Fault], int, bool]] = {
    "in a step": ([Fault("forward", 3, 1, TERM)], 3, False),
    "after the update": ([Fault("updated", 5, 3, signal.SIGUSR1)], 5, False),
    "in a validation": ([Fault("validation", 2, 2, signal.SIGINT)], 2, False),
    "in a save": ([Fault("before shards", 4, 3, signal.SIGHUP)], 4, False),
    "late in a save": ([Fault("after rename", 2, 0, TERM)], 2, False),
    "twice": (
        [
            *(Fault("forward", 3, 1, TERM), Fault("after shards", 3, 1, TERM)),
            *(Fault("closing", 3, 0, TERM), Fault("final status", 3, 0, TERM)),
        ],
        3,
        True,
    ),
    "before the first step": ([Fault("open", 0, 2, TERM)], 0, False),
    "before the world": ([Fault("plan", 0, 1, TERM)], 0, True),
}
LAUNCHES: dict[str, tuple[list[Fault], int]] = {
    "torchrun, in a step": ([Fault("forward", 3, LAUNCHER, TERM)], 3),
    "torchrun, in a save": ([Fault("before shards", 2, LAUNCHER, TERM)], 2),
    "torchrun, before the first step": ([Fault("open", 0, LAUNCHER, TERM)], 0),
    "one rank": ([Fault("forward", 3, 2, TERM)], 3),
    "torchrun, then its ranks": (
        [
            Fault("forward", 3, LAUNCHER, TERM),
            *(Fault(point, 3, r, TERM) for point in ("after shards", "closing") for r in range(4)),
        ],
        3,
    ),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return refer(tmp_path_factory.mktemp("straight") / "run", WORDS, WORLD)


def stopped_at(folder: Path) -> int:
    """The step that a run was preempted at; what it says and what it saved agree."""
    status = read_status(folder / "status.json")
    assert status is not None and status.state == "preempted", status
    saved = [path.name for path in committed(folder / "checkpoints")]
    assert saved == ([f"step_{status.step:08d}"] if status.step else [])
    assert ("its state is saved" in status.reason) == bool(status.step)
    steps = [record["step"] for record in read(folder / "metrics.jsonl") if "loss" in record]
    assert steps == list(range(1, status.step + 1))
    return status.step


def goes_on(folder: Path, reference: Reference) -> None:
    run = train_run(folder, WORDS, WORLD)
    assert run.codes == [0] * WORLD, folder.with_suffix(".log").read_text()
    assert_same_curve(run, reference)


@pytest.mark.parametrize(
    "case", [pytest.param(k, marks=[] if STOPS[k][2] else pytest.mark.full) for k in STOPS]
)
def test_all_ranks_stop_at_one_step(case: str, tmp_path: Path, reference: Reference) -> None:
    (faults, step, _), folder = STOPS[case], tmp_path / "run"
    outcomes = hit(folder, WORDS, WORLD, faults)
    output = folder.with_suffix(".log").read_text()
    assert [outcome.value for outcome in outcomes] == [EXIT_PREEMPTED] * WORLD, output
    assert done(notes(folder)) == len(faults), output
    assert "Traceback" not in output and output.count("moe_train: ") == 1, output
    assert stopped_at(folder) == step
    goes_on(folder, reference)


@pytest.mark.full
@pytest.mark.parametrize("case", LAUNCHES)
def test_a_launched_run_stops_within_the_grace(
    case: str, tmp_path: Path, reference: Reference
) -> None:
    (faults, step), folder = LAUNCHES[case], tmp_path / "run"
    output = launch(folder, WORDS, WORLD, faults)
    assert output.returncode != 0
    assert "SIGKILL" not in output.stderr
    assert codes(notes(folder)) == [EXIT_PREEMPTED] * WORLD, output.stdout + output.stderr
    assert stopped_at(folder) == step
    assert done(notes(folder)) == len(faults)
    goes_on(folder, reference)


def short_of_time(rank: int, world: int, args: list[str]) -> int:
    from moe_train.run.main import main

    os.environ |= {LAUNCHED: "test", TIMEOUT: "0"}
    return main(args)


def test_a_run_whose_saves_take_too_long_says_so_beforehand(tmp_path: Path) -> None:
    overrides = [*FAULTY, "train.steps=4", "checkpoint.every=1", "device=cpu", "log.wandb=disabled"]
    overrides += ["log.console=lines", f"run.dir={tmp_path}", "run.name=run"]
    log = tmp_path / "log"
    assert run_world(short_of_time, 1, overrides, log=log) == [0], log.read_text()
    output = log.read_text()
    assert (
        output.count("warning: a checkpoint cannot finish") == 1
        and "the 0 s that the launcher" in output
    )
    assert output.index("warning: a checkpoint") < output.index("step 2/4")


def test_a_save_that_outlasts_the_grace_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    clock = [0.0]
    monkeypatch.setattr("moe_train.run.shutdown_budget.time.monotonic", lambda: clock[0])
    budget = ShutdownBudget(30.0, lines.append)

    def spend(name: str, seconds: float) -> None:
        with budget.measure(name):
            clock[0] += seconds

    spend("training step", 40.0)
    spend("training step", 3.0)
    spend("validation", 9.0)
    budget.check(20.0)
    assert not lines, "the slow first step is over"
    budget.check(22.0)
    assert len(lines) == 1
    assert "31.0 s (validation 9.0 s, then the checkpoint 22.0 s)" in lines[0]
    budget.check(50.0)
    assert len(lines) == 1


def test_the_grace_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHED, raising=False)
    assert grace_seconds() == float("inf")
    monkeypatch.setenv(LAUNCHED, "any")
    monkeypatch.delenv(TIMEOUT, raising=False)
    assert grace_seconds() == 30.0
    monkeypatch.setenv(TIMEOUT, "90")
    assert grace_seconds() == 90.0
