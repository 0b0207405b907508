"""Life of checkpoint folders: staged, committed, damaged, passed over; and their commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train import cli
from moe_train.checkpoint import folders
from moe_train.checkpoint.digests import file_entry
from moe_train.checkpoint.manifest import Manifest, read_manifest, verify
from moe_train.errors import EXIT_CHECKPOINT, CheckpointError
from moe_train.testing.runs import train_run

SMALL = [
    *("parallel=single", "recompute=none", "batch.micro=1", "batch.global=2"),
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.head_dim=8"),
    *("model.experts=4", "model.expert_hidden=32", "data.sequence=32"),
    *("train.eval_every=0", "checkpoint.every=2", "optim.decay_steps=100"),
]


def write(root: Path, step: int, content: str = "weights") -> Path:
    """A committed checkpoint of one file, through the program's own life cycle."""
    staging = folders.staging_folder(root, step)
    (staging / "__0_0.distcp").write_text(content)
    (staging / "tensors.json").write_text("{}")
    Manifest(
        step=step,
        consumed_samples=step * 8,
        consumed_tokens=step * 1024,
        model={"layers": 2},
        layout="TP2",
        world=2,
        seed=1,
        optimizer_step=step,
        optimizer_states=[],
        tokenizer="abc",
        rng_sizes=[],
        files={name: file_entry(staging / name) for name in ("__0_0.distcp", "tensors.json")},
    ).write(staging)
    return folders.commit(staging)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_leftovers_of_a_killed_save_are_no_checkpoints_and_go(tmp_path: Path) -> None:
    write(tmp_path, 2)
    for leftover in ("step_00000004.tmp", "step_00000002.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "torn").write_text("x")
    (tmp_path / "notes").mkdir()
    assert [path.name for path in folders.committed(tmp_path)] == ["step_00000002"]
    staging = folders.staging_folder(tmp_path, 6)
    assert not list(staging.iterdir())
    assert names(tmp_path) == ["notes", "step_00000002", "step_00000006.tmp"]


def test_links_are_neither_taken_nor_followed(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", 8)
    root = tmp_path / "root"
    write(root, 2)
    (root / "step_00000008").symlink_to(outside)
    (root / "step_00000009.tmp").symlink_to(outside)
    folders.staging_folder(root, 4)
    folders.prune(root / "step_00000002", 1)
    assert [path.name for path in folders.committed(root)] == ["step_00000002"]
    assert verify(outside).step == 8


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 2, "old")
    again = write(tmp_path, 2, "newer")
    assert names(tmp_path) == ["step_00000002"]
    assert (again / "__0_0.distcp").read_text() == "newer"
    verify(again)


def test_keep(tmp_path: Path) -> None:
    for step in (2, 4, 6, 100_000_0):
        newest = write(tmp_path, step)
    folders.prune(newest, 2)
    assert names(tmp_path) == ["step_00000006", "step_01000000"]
    folders.prune(newest, 0)
    assert names(tmp_path) == ["step_01000000"]


def test_what_is_kept_is_whole(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        newest = write(tmp_path, step)
    (tmp_path / "step_00000004" / "__0_0.distcp").unlink()
    folders.prune(newest, 2)
    assert names(tmp_path) == ["step_00000002", "step_00000006"]


def test_the_new_one_stays_even_below_later_steps(tmp_path: Path) -> None:
    """A run that went on from step 2, past damage at 6, has just saved 4."""

    def saved(step: int) -> list[str]:
        newest = write(tmp_path, step)
        folders.quarantine_later(newest)
        folders.prune(newest, 1)
        assert folders.committed(tmp_path) == [newest]
        return names(tmp_path)

    for step in (2, 6):
        flip(write(tmp_path, step) / "__0_0.distcp")
    assert saved(4) == ["step_00000004", "step_00000006.superseded-1"]
    write(tmp_path, 6)
    superseded = ["step_00000006.superseded-1", "step_00000006.superseded-2"]
    assert saved(5) == ["step_00000005", *superseded]
    # Version 0.1 gave them another name; they go when the run has come to their step again.
    (tmp_path / "step_00000006.left1").mkdir()
    (tmp_path / "step_00000008.left1").mkdir()
    assert saved(6) == ["step_00000006", "step_00000008.left1"]


def flip(path: Path) -> None:
    """One bit, same size."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "flipped bit": (lambda f: flip(f / "__0_0.distcp"), "does not match its SHA-256"),
    "torn": (lambda f: (f / "__0_0.distcp").write_text("w"), "has 1 bytes, not 7"),
    "gone": (lambda f: (f / "__0_0.distcp").unlink(), "is missing or not a plain file"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "cannot be read"),
    "not JSON": (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
    "other format": (lambda f: (f / "manifest.json").write_text("{}"), "manifest of format"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_by_name(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, overrides = DAMAGE[kind]
    folder = write(tmp_path, 2)
    verify(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=overrides) as caught:
        verify(folder)
    assert "step_00000002" in caught.value.field
    assert cli.main(["checkpoint", "verify", str(folder)]) == EXIT_CHECKPOINT
    assert overrides in capsys.readouterr().out


def test_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    folder = write(tmp_path, 2)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"]["../secret"] = {"size": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"\.\./secret"):
        read_manifest(folder)


def test_list_shows_damage_beside_the_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, table = tmp_path / "run", tmp_path / "table.json"
    write(run / "checkpoints", 2)
    flip(write(run / "checkpoints", 4) / "__0_0.distcp")
    for place in (run, run / "checkpoints"):
        assert cli.main(["checkpoint", "list", str(place), "--json", str(table)]) == EXIT_CHECKPOINT
        rows = json.loads(table.read_text())["checkpoints"]
        assert [row["verified"] for row in rows] == [False, True]
        assert (rows[1]["step"], rows[1]["layout"], rows[1]["samples"]) == (2, "TP2", 16)
        assert "SHA-256" in rows[0]["damage"]
        assert "damaged: " in capsys.readouterr().out
    # Sizes alone cannot see a flipped bit: that is what --quick says of itself.
    assert cli.main(["checkpoint", "list", str(run), "--quick"]) == 0


def test_verify_takes_several_and_tells_each(tmp_path: Path) -> None:
    good, table = write(tmp_path / "a", 2), tmp_path / "table.json"
    argv = ["checkpoint", "verify", str(good), str(tmp_path / "none"), "--json", str(table)]
    assert cli.main(argv) == EXIT_CHECKPOINT
    assert [row["verified"] for row in json.loads(table.read_text())["checkpoints"]] == [
        True,
        False,
    ]
    assert cli.main(argv[:3]) == 0


def test_verify_of_a_run_takes_all_its_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        newest = write(tmp_path / "checkpoints", step)
    assert cli.main(["checkpoint", "verify", str(tmp_path), "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [row["step"] for row in rows] == [4, 2]
    assert cli.main(["checkpoint", "list", str(newest)]) == 0
    assert "step_00000004" in capsys.readouterr().out


def test_nothing_to_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "list", str(tmp_path)]) == EXIT_CHECKPOINT
    assert "has no committed checkpoint" in capsys.readouterr().err


def test_the_commands_need_no_torch(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints", 2)
    code = (
        "import sys; from moe_train.cli import main;"
        f"code = main(['checkpoint', 'list', {str(tmp_path)!r}]);"
        "sys.exit(f'{code}' if code or 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.world
def test_resume_passes_over_damage_and_says_so(tmp_path: Path) -> None:
    run = train_run(tmp_path / "r", [*SMALL, "train.steps=4", "checkpoint.keep=3"])
    assert run.codes == [0]
    root = run.folder / "checkpoints"
    assert names(root) == ["step_00000002", "step_00000004"]
    first = {record["step"]: record["loss_hex"] for record in run.steps}
    torn = root / "step_00000006.tmp"
    torn.mkdir()
    flip(root / "step_00000004" / "__0_0.distcp")
    again = train_run(tmp_path / "r", [*SMALL, "train.steps=6", "checkpoint.keep=3"])
    output = again.folder.with_suffix(".log").read_text()
    assert again.codes == [0]
    assert "skipped a damaged checkpoint" in output and "step_00000004" in output
    assert "step_00000002 at step 2" in output
    # Steps 3 and 4 were repeated, bit for bit, and stand in the metrics once.
    assert again.column("step") == [1, 2, 3, 4, 5, 6]
    assert {record["step"]: record["loss_hex"] for record in again.steps[:4]} == first
    # Step 4 was saved again over the damaged one.
    assert names(root) == ["step_00000002", "step_00000004", "step_00000006"]
    assert verify(root / "step_00000004").step == 4

    for folder in folders.committed(root):
        flip(folder / "__0_0.distcp")
    lost = train_run(tmp_path / "r", [*SMALL, "train.steps=8", "checkpoint.keep=3"])
    assert lost.codes == [EXIT_CHECKPOINT]
    output = lost.folder.with_suffix(".log").read_text()
    assert "all 3 checkpoints are damaged" in output and "checkpoint.resume=never" in output
    assert "Traceback" not in output
    # What the finished run said of itself still stands.
    assert json.loads((run.folder / "status.json").read_text())["state"] == "finished"
    assert lost.column("step") == [1, 2, 3, 4, 5, 6]
