"""A checkpoint that is written beside the training: what it costs, holds and promises."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_train.checkpoint.folders import committed
from moe_train.errors import EXIT_CHECKPOINT, EXIT_HUNG, EXIT_PREEMPTED
from moe_train.run_folder.metrics import read
from moe_train.testing.layouts import TP2
from moe_train.testing.runs import Run, train_run
from moe_train.testing.world import Outcome, run_world
from tests.support.survival import FAULTY, Reference, assert_same_curve, named, refer

pytestmark = pytest.mark.world

STEPS, WORLD = 8, 2
WORDS = [*FAULTY, *TP2.overrides, f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=9"]
BESIDE = [*WORDS, "checkpoint.asynchronous=true"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Saves in its step's time."""
    return refer(tmp_path_factory.mktemp("straight") / "run", WORDS, WORLD)


def slow(
    rank: int, world: int, overrides: Sequence[str], until: int, end: str, logs: str
) -> tuple[int, dict[int, list[str]]]:
    """Rank 1's first save is not written before step ``until`` is trained; then ``end`` happens.

    Returns:
        The exit code, and the checkpoints that there were at the end of each step.
    """
    import threading

    from moe_train.checkpoint.write import ShardWriter
    from moe_train.run.main import main
    from moe_train.train import loop

    reached, calls, seen = threading.Event(), [], {}
    write, train = ShardWriter.write, loop.train_step

    def run(self: ShardWriter) -> None:
        calls.append(self)
        if rank == 1 and len(calls) == 1:
            assert reached.wait(60)
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if end == "refused":
                raise OSError(28, "No space left on device")
        write(self)

    def step(engine: Any, batches: Any, number: int, **how: Any) -> Any:
        result = train(engine, batches, number, **how)
        seen[number] = [path.name for path in committed(Path(logs) / "checkpoints")]
        if number == until:
            if end == "stopped" and rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            reached.set()
        return result

    ShardWriter.write, loop.train_step = run, step  # type: ignore[method-assign, assignment]
    return main(overrides), seen


def late(folder: Path, until: int, end: str, args: Sequence[str] = BESIDE) -> list[Outcome]:
    outcomes: list[Outcome] = run_world(
        slow,
        WORLD,
        named(folder, args),
        until,
        end,
        str(folder),
        log=folder.with_suffix(".log"),
        tolerate=True,
    )
    return outcomes


def finished(folder: Path) -> Run:
    return Run([0] * WORLD, folder, read(folder / "metrics.jsonl"))


def test_training_goes_on_and_the_checkpoint_holds_its_own_step(
    tmp_path: Path, reference: Reference
) -> None:
    """Two steps change the weights before rank 1 writes those of step 2."""
    folder = tmp_path / "run"
    # The next save waits for the one on its way, so step 4 is the last that can be trained.
    outcomes = late(folder, 4, "written")
    assert [outcome.value[0] for outcome in outcomes] == [0, 0], folder.with_suffix(".log")
    for outcome in outcomes:
        seen = outcome.value[1]
        assert seen[3] == seen[4] == [], "it counts before all of it is on the disk"
        assert seen[8], "it never counts"
    assert_same_curve(finished(folder), reference)
    again = tmp_path / "again"
    early = committed(folder / "checkpoints")[-1]
    assert early.name == "step_00000002"
    run = train_run(again, [*WORDS, f"checkpoint.resume={early}"], WORLD)
    assert run.codes == [0] * WORLD
    assert run.column("loss_hex") == reference.run.column("loss_hex")[2:]


def test_a_rank_killed_while_it_writes(tmp_path: Path, reference: Reference) -> None:
    folder = tmp_path / "run"
    outcomes = late(folder, 3, "killed")
    assert outcomes[1].failure == "died without a result"
    assert outcomes[0].value[0] == EXIT_HUNG, folder.with_suffix(".log").read_text()
    assert not committed(folder / "checkpoints")
    run = train_run(folder, BESIDE, WORLD)
    assert run.codes == [0] * WORLD
    assert_same_curve(run, reference)


def test_a_write_that_fails_fails_on_all_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcomes = late(folder, 3, "refused")
    output = folder.with_suffix(".log").read_text()
    assert [outcome.value[0] for outcome in outcomes] == [EXIT_CHECKPOINT] * WORLD, output
    assert output.count("rank 1: OSError: [Errno 28] No space left on device") >= 1
    assert "Traceback" not in output
    assert not list((folder / "checkpoints").iterdir()), "what was written stays"


def test_a_stop_waits_for_what_is_on_its_way(tmp_path: Path, reference: Reference) -> None:
    folder = tmp_path / "run"
    outcomes = late(folder, 3, "stopped")
    output = folder.with_suffix(".log").read_text()
    assert [outcome.value[0] for outcome in outcomes] == [EXIT_PREEMPTED] * WORLD, output
    names = [path.name for path in committed(folder / "checkpoints")]
    assert names == ["step_00000003", "step_00000002"]
    run = train_run(folder, BESIDE, WORLD)
    assert run.codes == [0] * WORLD
    assert_same_curve(run, reference)
