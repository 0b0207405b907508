"""Every file of a checkpoint, damaged in every way; a disk that fills up; no room to begin."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_train.checkpoint.manifest import verify
from moe_train.errors import EXIT_CHECKPOINT
from moe_train.run_folder.metrics import read
from moe_train.testing.runs import QUIET, train_run
from moe_train.testing.world import run_world

pytestmark = pytest.mark.world
SMALL = [
    *("parallel=single", "recompute=none", "batch.micro=1", "batch.global=2"),
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.head_dim=8"),
    *("model.experts=4", "model.expert_hidden=32", "data.sequence=32"),
    *("train.eval_every=0", "checkpoint.every=2", "checkpoint.keep=3", "optim.decay_steps=100"),
]


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped": flip,
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
}


def _resume(folder: Path) -> tuple[int, str]:
    """One more step of the run in ``folder``: exit code, and what was told."""
    from moe_train.run.main import main

    output = io.StringIO()
    overrides = [f"run.dir={folder.parent}", f"run.name={folder.name}", *QUIET, *SMALL]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main([*overrides, "train.steps=5", "checkpoint.every=0"])
    return code, output.getvalue()


def _damaged(rank: int, world: int, run: str, scratch: str) -> dict[str, tuple[int, str]]:
    """All cases in one process: file of the newest checkpoint x damage, and all damaged."""
    result = {}
    files = sorted(p.name for p in (Path(run) / "checkpoints/step_00000004").iterdir())
    cases = [(file, damage, ["step_00000004"]) for file in files for damage in DAMAGES]
    cases += [
        (files[number % len(files)], damage, ["step_00000004", "step_00000002"])
        for number, damage in enumerate(DAMAGES)
    ]
    for number, (file, damage, steps) in enumerate(cases):
        folder = Path(scratch) / f"case{number}"
        shutil.copytree(run, folder)
        for step in steps:
            DAMAGES[damage](folder / "checkpoints" / step / file)
        result[f"{len(steps)} {damage} {file}"] = _resume(folder)
        assert not (folder / "checkpoints/step_00000006").exists()
    return result


def test_every_file_times_every_damage(tmp_path: Path) -> None:
    run = train_run(tmp_path / "r", [*SMALL, "train.steps=4"])
    assert run.codes == [0]
    steps = {record["step"]: record["loss_hex"] for record in run.steps}
    (outcomes,) = run_world(_damaged, 1, str(run.folder), str(tmp_path / "cases"))
    one = {case: output for case, output in outcomes.items() if case.startswith("1 ")}
    assert {case.split()[2] for case in one} >= {
        "__0_0.distcp",
        "manifest.json",
        "tensors.json",
    }
    assert len(one) == 4 * len({case.split()[2] for case in one})
    for number, (case, (code, output)) in enumerate(one.items()):
        assert code == 0, f"{case}: {output}"
        assert "warning: skipped a damaged checkpoint" in output, case
        _, damage, file = case.split()
        # Most of a manifest is digests: a flipped one cannot be told from a flipped block.
        blamed = (
            {file, "__0_0.distcp"} if (damage, file) == ("flipped", "manifest.json") else {file}
        )
        assert any(f"step_00000004/{name}" in output for name in blamed), f"{case}: {output}"
        assert "step_00000002 at step 2" in output and "Traceback" not in output, case
        # The steps that the damage cost were repeated, bit for bit.
        again = read(tmp_path / "cases" / f"case{number}" / "metrics.jsonl")
        assert {r["step"]: r["loss_hex"] for r in again if r["step"] < 5} == steps, case
    for case, (code, output) in outcomes.items():
        if case not in one:
            assert code == EXIT_CHECKPOINT, f"{case}: {output}"
            assert "all 2 checkpoints are damaged" in output and "Traceback" not in output, case


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs the superuser")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


TWO = [*SMALL, "parallel.expert=2", "model.expert_hidden=256"]


def _fills_up(rank: int, world: int, overrides: list[str], disk: str, alone: bool) -> int:
    """While the second checkpoint is written, room ends: for all, or for rank 1 alone."""
    import resource

    from moe_train.checkpoint.write import ShardWriter
    from moe_train.run.main import main

    write = ShardWriter.write
    calls = []

    def crowded(self: ShardWriter) -> None:
        calls.append(self)
        if len(calls) == 2 and rank == 1 and alone:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        elif len(calls) == 2 and rank == 1:
            with open(Path(disk) / "filler", "wb") as filler:
                filler.write(b"\0" * (shutil.disk_usage(disk).free - 100_000))
        write(self)

    ShardWriter.write = crowded  # type: ignore[method-assign]
    return main(overrides)


def _plain(rank: int, world: int, overrides: list[str]) -> int:
    from moe_train.run.main import main

    return main(overrides)


@pytest.mark.parametrize(
    "alone",
    [
        pytest.param(False, marks=pytest.mark.full, id="disk full"),
        pytest.param(True, id="rank 1 alone cannot write"),
    ],
)
def test_no_room_in_the_middle_of_a_save(small_disk: Path, tmp_path: Path, alone: bool) -> None:
    log = tmp_path / "log"
    overrides = [*QUIET, *TWO, f"run.dir={small_disk}", "run.name=r"]
    codes = run_world(_fills_up, 2, [*overrides, "train.steps=4"], str(small_disk), alone, log=log)
    output = log.read_text()
    assert codes == [EXIT_CHECKPOINT] * 2, output
    assert output.count("could not be written (rank ") == 1 and "is untouched" in output
    assert "Traceback" not in output
    assert "(rank 1: " in output or not alone
    root = small_disk / "r/checkpoints"
    assert [path.name for path in root.iterdir()] == ["step_00000002"]
    verify(root / "step_00000002")
    (small_disk / "filler").unlink(missing_ok=True)
    # With room again it goes on as if nothing had been.
    whole = train_run(tmp_path / "whole", [*TWO, "train.steps=4"], world=2)
    assert run_world(_plain, 2, [*overrides, "train.steps=4"], log=log) == [0, 0], log.read_text()
    again = [r["loss_hex"] for r in read(small_disk / "r/metrics.jsonl") if "loss_hex" in r]
    assert again == whole.column("loss_hex")


def test_no_room_is_told_before_the_first_byte(small_disk: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    (small_disk / "filler").write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 1_500_000))
    overrides = [*QUIET, *TWO, f"run.dir={small_disk}", "run.name=r", "train.steps=2"]
    codes = run_world(_plain, 2, [*overrides], log=log)
    output = log.read_text()
    assert codes == [EXIT_CHECKPOINT] * 2, output
    assert "MiB free and this checkpoint needs" in output and "checkpoint.keep" in output
    assert not list((small_disk / "r/checkpoints").iterdir())
    status = json.loads((small_disk / "r/status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 2)
