"""Hostile checkpoints: no code of theirs runs, no file outside is opened, all is refused."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_train.checkpoint.digests import file_entry
from moe_train.checkpoint.index import read_index
from moe_train.checkpoint.manifest import MAX_BYTES, Manifest, read_manifest, verify
from moe_train.errors import EXIT_CHECKPOINT, CheckpointError
from moe_train.testing.runs import QUIET, train_run
from moe_train.testing.world import run_world

SMALL = [
    *("parallel=single", "recompute=none", "batch.micro=1", "batch.global=2"),
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.head_dim=8"),
    *("model.experts=4", "model.expert_hidden=32", "data.sequence=32"),
    *("train.eval_every=0", "checkpoint.every=2", "optim.decay_steps=100"),
]
ELSEWHERE = (".metadata", "common.pt", "metadata.json", "__0_1.distcp", "notes.npy")
"""Names that torch, Megatron or nobody would open."""


class Touch:
    """Unpickled, it creates a file: code ran."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def plain_pickle(canary: Path) -> bytes:
    return pickle.dumps(Touch(canary))


def torch_archive(canary: Path) -> bytes:
    """What torch.save would write, with a hostile pickle inside."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", plain_pickle(canary))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return out.getvalue()


def test_the_canary_sings(tmp_path: Path) -> None:
    """The attack is real where unpickling is not restricted."""
    import torch

    pickle.loads(plain_pickle(tmp_path / "one"))
    torch.load(io.BytesIO(torch_archive(tmp_path / "two")), weights_only=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def describe(folder: Path) -> None:
    """Let manifest and index agree with what the files now hold, as an attacker would."""
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"] = {
        path.name: file_entry(path) for path in folder.iterdir() if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(raw))


def in_items(folder: Path, content: bytes) -> None:
    """Hostile bytes in place of every tensor, found through the index."""
    index = json.loads((folder / "tensors.json").read_text())
    (folder / "__0_0.distcp").write_bytes(content)
    for tensor in index["tensors"].values():
        for chunk in tensor["chunks"]:
            chunk["file"], chunk["begin"], chunk["length"] = "__0_0.distcp", 0, len(content)
    (folder / "tensors.json").write_text(json.dumps(index))


PLACES: dict[str, Callable[[Path, bytes], object]] = {
    "the manifest": lambda folder, bad: (folder / "manifest.json").write_bytes(bad),
    "the index": lambda folder, bad: (folder / "tensors.json").write_bytes(bad),
    "the tensors": in_items,
} | {name: (lambda folder, bad, name=name: (folder / name).write_bytes(bad)) for name in ELSEWHERE}


def _hostile(rank: int, world: int, run: str, scratch: str) -> dict[str, tuple[int, str, bool]]:
    import contextlib

    from moe_train.run.main import main

    result = {}
    for form in (plain_pickle, torch_archive):
        for name, place in PLACES.items():
            for agreed in (False, True):
                case = f"{form.__name__}, {name}" + (", manifest agrees" if agreed else "")
                folder = Path(scratch) / f"case{len(result)}"
                shutil.copytree(run, folder)
                checkpoint = folder / "checkpoints/step_00000002"
                canary = Path(scratch) / f"canary{len(result)}"
                place(checkpoint, form(canary))
                if agreed and name != "the manifest":
                    describe(checkpoint)
                output = io.StringIO()
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                    overrides = [*QUIET, *SMALL, f"run.dir={scratch}", f"run.name={folder.name}"]
                    code = main([*overrides, "train.steps=3"])
                result[case] = (code, output.getvalue(), canary.exists())
    return result


@pytest.mark.world
def test_a_pickle_in_every_place(tmp_path: Path) -> None:
    run = train_run(tmp_path / "r", [*SMALL, "train.steps=2"])
    assert run.codes == [0]
    names = {path.name for path in (run.folder / "checkpoints/step_00000002").iterdir()}
    # Each file that there is has its case above.
    assert names == {"manifest.json", "tensors.json", "__0_0.distcp"}
    (outcomes,) = run_world(_hostile, 1, str(run.folder), str(tmp_path / "cases"))
    assert len(outcomes) == 4 * len(PLACES)
    for case, (code, output, sang) in outcomes.items():
        assert not sang, f"{case}: code of the checkpoint ran"
        assert code == EXIT_CHECKPOINT, f"{case}: {output}"
        assert "Traceback" not in output and output.count("moe_train: ") == 1, f"{case}: {output}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one tensor, sound in every respect."""
    folder = tmp_path / "step_00000002"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"12345678")
    chunk = {"offset": [0], "shape": [2], "file": "__0_0.distcp", "begin": 0, "length": 8}
    tensors = {"w": {"dtype": "float32", "shape": [2], "chunks": [chunk]}}
    (folder / "tensors.json").write_text(json.dumps({"format": 1, "tensors": tensors}))
    Manifest(
        step=2,
        consumed_samples=8,
        consumed_tokens=8,
        model={},
        layout="TP1",
        world=1,
        seed=1,
        optimizer_step=2,
        optimizer_states=["exp_avg"],
        tokenizer="abc",
        rng_sizes=[8],
        files={name: file_entry(folder / name) for name in ("__0_0.distcp", "tensors.json")},
    ).write(folder)
    read_index(folder, verify(folder))
    return folder


def set_field(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(json.dumps(raw))


FACTS = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "name",
    ["../x.distcp", "/etc/passwd", "a/__0_0.distcp", "..", "", "__0_0.distcp\n", "__0_0.distcp\0"]
    + ["__٣_0.distcp", "__0_0.distcp/", "manifest.json", "x" * 10_000],
)
def test_names_that_lead_elsewhere(folder: Path, name: str) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    set_field(folder, files=files | {name: FACTS})
    with pytest.raises(CheckpointError, match="is not a checkpoint's file") as caught:
        read_manifest(folder)
    assert len(str(caught.value)) < 1000


def test_links_in_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    for name in ("__0_0.distcp", "tensors.json", "manifest.json"):
        path, moved = folder / name, tmp_path / f"moved_{name}"
        path.rename(moved)
        path.symlink_to(moved)
        with pytest.raises(CheckpointError, match="plain file") as caught:
            verify(folder)
        assert name in caught.value.field
        path.unlink()
        moved.rename(path)
    verify(folder)


def test_pipes_do_not_block(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(CheckpointError, match="is not a plain file"):
        verify(folder)


def test_oversized_manifest(folder: Path) -> None:
    with (folder / "manifest.json").open("r+b") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"more than {MAX_BYTES}"):
        read_manifest(folder)
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(folder)


CHUNK: dict[str, dict[str, Any]] = {
    "outside": {"file": "../x"},
    "absolute": {"file": "/etc/passwd"},
    "unlisted": {"file": "__9_9.distcp"},
    "the index itself": {"file": "tensors.json"},
    "beyond the file": {"begin": 4},
    "negative": {"begin": -4},
    "outside the tensor": {"offset": [1]},
    "hole": {"shape": [1]},
    "huge": {"length": 2**70},
    "wrong rank": {"offset": [0, 0]},
    "no number": {"shape": ["2"]},
    "truth": {"begin": False},
}


@pytest.mark.parametrize("case", CHUNK)
def test_index_that_names_what_is_not_there(folder: Path, case: str) -> None:
    path = folder / "tensors.json"
    index = json.loads(path.read_text())
    index["tensors"]["w"]["chunks"][0] |= CHUNK[case]
    path.write_text(json.dumps(index))
    describe(folder)
    with pytest.raises(CheckpointError, match=r"'tensors\.w\.|tensor 'w' is malformed"):
        read_index(folder, verify(folder))
    index["tensors"]["w"] = {"dtype": "object", "shape": [2], "chunks": []}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="malformed"):
        read_index(folder, read_manifest(folder))


def test_nothing_of_ours_unpickles() -> None:
    """No module of the program calls what can run a file's code."""
    wrong = []
    for path in (Path(__file__).resolve().parents[2] / "moe_train").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called, safe = ast.unparse(node.func), [ast.unparse(k) for k in node.keywords]
            risky = (
                called in ("pickle.load", "pickle.loads", "yaml.unsafe_load", "eval", "exec")
                or (called == "torch.load" and "weights_only=True" not in safe)
                or (called in ("np.load", "numpy.load") and "allow_pickle=True" in safe)
            )
            if risky:
                wrong.append(f"{path.name}:{node.lineno} {called}")
    assert not wrong
