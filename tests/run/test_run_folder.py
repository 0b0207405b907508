"""Run folder and status: names, resumption, and refusals before anything else happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moe_train.errors import ConfigError
from moe_train.run_folder.folder import RunFolder, create_run_folder, default_run_name
from moe_train.run_folder.status import Status, read_status, write_status

NAME = default_run_name("twin", "TP2.PP4.EP2")


def create(parent: Path, name: str | None = None, *, fresh: bool = False) -> RunFolder:
    return create_run_folder(parent, name, default_name=NAME, fresh=fresh)


def test_status_round_trip_and_file_format(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert read_status(path) is None
    write_status(path, "failed", 7, "rank 3 was lost")
    assert read_status(path) == Status("failed", 7, "rank 3 was lost")
    assert json.loads(path.read_text()) == {
        "state": "failed",
        "step": 7,
        "reason": "rank 3 was lost",
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("content", [b"", b"\0" * 60, b'{"state": "run', b"\xff"])
def test_a_status_file_lost_in_a_crash_counts_as_missing(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = create(tmp_path)
    folder.status.write_bytes(content)
    assert read_status(folder.status) is None
    assert create(tmp_path) == folder
    assert caplog.text.count("is empty or damaged") == 1


@pytest.mark.parametrize("text", ["[]", '{"state": "sleeping", "step": 1}', '{"state": "failed"}'])
def test_a_foreign_status_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "status.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="status"):
        read_status(path)


def test_parts_exist_and_config_is_readable(tmp_path: Path) -> None:
    folder = create(tmp_path)
    assert folder.path == tmp_path / "twin-TP2.PP4.EP2"
    assert folder.checkpoints.is_dir() and folder.logs.is_dir() and folder.experts.is_dir()
    folder.write_config({"device": "cpu", "model": {"layers": 16}})
    assert yaml.safe_load(folder.config.read_text()) == {"device": "cpu", "model": {"layers": 16}}


def test_default_name_continues_unfinished_and_leaves_finished(tmp_path: Path) -> None:
    first = create(tmp_path)
    for state in ("running", "preempted", "failed"):
        write_status(first.status, state, 3)  # type: ignore[arg-type]
        assert create(tmp_path) == first
    write_status(first.status, "finished", 3)
    second = create(tmp_path)
    assert second.path.name == f"{NAME}-2"
    assert create(tmp_path) == second
    write_status(second.status, "finished", 3)
    assert create(tmp_path).path.name == f"{NAME}-3"


def test_fresh_passes_over_unfinished_runs(tmp_path: Path) -> None:
    create(tmp_path)
    assert create(tmp_path, fresh=True).path.name == f"{NAME}-2"


def test_an_explicit_name_is_used_as_it_is(tmp_path: Path) -> None:
    folder = create(tmp_path, "mine")
    write_status(folder.status, "finished", 3)
    assert create(tmp_path, "mine") == folder


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a/"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        create(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_exist_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir: .*cannot be written"):
        create(tmp_path / "file" / "runs")


def test_a_folder_that_takes_no_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders may exist already while the disk is full or mounted read-only."""
    create(tmp_path)

    def full_disk(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full_disk)
    with pytest.raises(ConfigError, match="No space left"):
        create(tmp_path)
