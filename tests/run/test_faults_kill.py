"""A rank killed anywhere: the run goes on from its last checkpoint as if nothing had been."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moe_train.checkpoint import folders
from moe_train.checkpoint.folders import committed
from moe_train.checkpoint.manifest import verify
from moe_train.errors import EXIT_HUNG
from moe_train.run_folder.metrics import read
from moe_train.run_folder.status import read_status
from moe_train.testing.layouts import TP2_PP2_EP2, TP2_PP2_EP4_SPAN, Layout
from moe_train.testing.runs import Run, train_run
from tests.support.faults import SAVING, Fault, done
from tests.support.survival import FAULTY, Reference, assert_same_curve, hit, launch, notes, refer

pytestmark = pytest.mark.world

EVERY, STEPS = 2, 6
SAVES = (f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=1")
LAYOUTS = {"stage": TP2_PP2_EP2, "span": TP2_PP2_EP4_SPAN}
TRAINING = ("forward", "update", "updated")


def step_of(kind: str, rank: int, point: str) -> int:
    """A step at which the point is passed, drawn by the case's own seed."""
    drawn = random.Random(f"{kind} {rank} {point}")
    if point not in SAVING:
        return drawn.randrange(1, STEPS + 1)
    # Nothing is old enough to be purged at the first save.
    return drawn.randrange(2 * EVERY if point == "during purge" else EVERY, STEPS + 1, EVERY)


GRID = [
    (kind, rank, point) for kind in LAYOUTS for point in (*TRAINING, *SAVING) for rank in range(4)
]
QUICK = {
    ("stage", 0, "before rename"),
    ("span", 3, "after shards"),
}
LAUNCHED = [
    ("stage", 1, "forward"),
    ("stage", 0, "before rename"),
    ("span", 3, "after shards"),
    ("span", 2, "during purge"),
]


def args(layout: Layout) -> list[str]:
    return [*FAULTY, *SAVES, *layout.overrides]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    folder = tmp_path_factory.mktemp("straight")
    return {
        kind: refer(folder / kind, args(layout), layout.world) for kind, layout in LAYOUTS.items()
    }


@pytest.mark.parametrize(
    ("kind", "rank", "point"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.full) for case in GRID],
)
def test_a_killed_rank_costs_nothing_but_time(
    kind: str, rank: int, point: str, tmp_path: Path, references: dict[str, Reference]
) -> None:
    layout, folder = LAYOUTS[kind], tmp_path / "run"
    step = step_of(kind, rank, point)
    outcomes = hit(folder, args(layout), layout.world, [Fault(point, step, rank)])
    output = folder.with_suffix(".log").read_text()
    assert done(notes(folder)) == 1, f"step {step} was never {point}\n{output}"
    assert outcomes[rank].failure == "died without a result"
    alive = [outcome for number, outcome in enumerate(outcomes) if number != rank]
    assert [outcome.value for outcome in alive] == [EXIT_HUNG] * 3, output
    assert "Traceback" not in output and output.count("moe_train: ") == 1, output
    for result in committed(folder / "checkpoints")[:1]:
        verify(result)
    assert all(record["step"] <= step for record in read(folder / "metrics.jsonl"))

    again = train_run(folder, args(layout), layout.world)
    assert again.codes == [0] * layout.world, folder.with_suffix(".log").read_text()
    assert_same_curve(again, references[kind])
    left = [path.name for path in (folder / "checkpoints").iterdir()]
    assert left == [f"step_{STEPS:08d}"], "torn or old folders stay behind"


@pytest.mark.full
@pytest.mark.parametrize(("kind", "rank", "point"), LAUNCHED)
def test_torchrun_restarts_by_itself(
    kind: str, rank: int, point: str, tmp_path: Path, references: dict[str, Reference]
) -> None:
    layout, folder = LAYOUTS[kind], tmp_path / "run"
    fault = Fault(point, step_of(kind, rank, point), rank)
    output = launch(folder, args(layout), layout.world, [fault], "--max-restarts=1")
    assert output.returncode == 0, output.stdout + output.stderr
    assert done(notes(folder)) == 1
    status = read_status(folder / "status.json")
    assert status is not None and (status.state, status.step) == ("finished", STEPS)
    resumed = Run([0] * layout.world, folder, read(folder / "metrics.jsonl"))
    assert_same_curve(resumed, references[kind])


def test_the_one_that_was_in_the_way_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is saved again, and the rank is killed when neither copy has its name."""
    final = tmp_path / "step_00000004"
    for content in ("first", "second"):
        staging = folders.staging_folder(tmp_path, 4)
        (staging / "weights").write_text(content)
        if content == "first":
            folders.commit(staging)
    plain = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self == staging:
            raise KeyboardInterrupt
        return plain(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        folders.commit(staging)
    assert not final.exists()
    folders.recover_interrupted_commit(tmp_path)
    assert (final / "weights").read_text() == "first"
    folders.staging_folder(tmp_path, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [final.name, "step_00000006.tmp"]
