"""Libraries that training does without: absent, they cost one clear line or refusal."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from moe_train.callbacks.recorders import MetricsRecorder
from moe_train.callbacks.wandb import WandbFollower, installed
from moe_train.data.sources import Source, read
from moe_train.errors import ConfigFaults, DataError
from moe_train.run.resolution import resolve_on_all_ranks
from moe_train.run_folder.folder import RunFolder
from tests.support import events
from tests.support.survival import FAULTY

ABSENT = ("wandb", "pyarrow", "zstandard", "scipy", "matplotlib", "transformers",
          "transformer_engine", "pytest")  # fmt: skip
TRAIN = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))  # an import of these now fails
from moe_train.run.main import main
sys.exit(main(sys.argv[1:]))
"""


def absent(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_training_does_without_them_and_says_one_line(tmp_path: Path) -> None:
    overrides = [
        *(*FAULTY, "device=cpu", "train.steps=1", "checkpoint.every=0"),
        *(f"run.dir={tmp_path}", "run.name=bare", "log.console=lines"),
    ]
    done = subprocess.run([sys.executable, "-c", TRAIN, *overrides], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "bare" / "status.json").read_text())["state"] == "finished"
    [line] = [line for line in done.stdout.splitlines() if "wandb" in line or "W&B" in line]
    assert "not installed" in line and "metrics.jsonl" in line


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_by_name_without_the_library_is_refused(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    absent(monkeypatch, "wandb")
    with pytest.raises(ConfigFaults, match=r"log\.wandb: .* not installed"):
        resolve_on_all_ranks(["experiment=single", "device=cpu", f"log.wandb={mode}"], 1)
    resolve_on_all_ranks(["experiment=single", "device=cpu"], 1)


def test_wandb_auto_without_the_library_says_so_and_does_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    absent(monkeypatch, "wandb")
    folder = RunFolder(tmp_path)
    metrics = MetricsRecorder(folder.metrics, 0.0)
    follower = WandbFollower("auto", project="p", folder=folder, config={}, metrics=metrics)
    events.play(follower, [{"step": 1, "loss": 1.0}])
    [record] = caplog.records
    assert "not installed" in record.getMessage()
    assert not folder.wandb.exists()


def test_a_folder_called_wandb_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = ModuleSpec("wandb", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: namespace)
    assert not installed()


@pytest.mark.parametrize(
    ("name", "kind", "library"),
    [("a.parquet", "parquet", "pyarrow"), ("a.jsonl.zst", "jsonl", "zstandard")],
)
def test_a_file_that_needs_one_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, kind: str, library: str
) -> None:
    absent(monkeypatch, library)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"needs {library} to be read"):
        list(read(Source(tmp_path / name, kind)))
