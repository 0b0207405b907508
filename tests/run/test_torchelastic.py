"""torchrun's own report quotes why a rank ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from moe_train.errors import EXIT_CONFIG
from moe_train.run import main as runtime
from moe_train.run.torchelastic import ERROR_FILE, write_error_file


def test_torchrun_shows_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(path))
    assert runtime.main(["device=cpu", "model.expert=3"]) == EXIT_CONFIG
    failure = ProcessFailure(0, 1, EXIT_CONFIG, str(path))
    report = ChildFailedError("train.py", {0: failure}).format_msg()
    assert "model.expert" in report and "1 config error" in report


def test_without_torchrun_or_a_place_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ERROR_FILE, raising=False)
    write_error_file("a reason")
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "missing" / "error.json"))
    write_error_file("a reason")
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    write_error_file("a reason")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "a reason"
