"""The commands ``data prepare`` and ``data inspect``, as a user runs them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moe_train.cli import main
from moe_train.commands.data import PrepareProgress, inspect_main, prepare_main
from moe_train.data.prepare import Progress


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"story {i}"}) + "\n" for i in range(30)))
    return path


def test_prepare_then_inspect(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, report = str(tmp_path / "o"), tmp_path / "r.json"
    assert prepare_main([str(source), "--output", output, "--json", str(report)]) == 0
    shown = capsys.readouterr()
    assert "nats/token" in shown.out
    assert "1/1 files" in shown.err
    assert json.loads(report.read_text())["documents"] == 30
    args = [output, "--samples", "2", "--verify", "--json", str(report)]
    assert inspect_main(args) == 0
    shown = capsys.readouterr()
    assert "story 0" in shown.out
    assert "story 29" in shown.out
    result = json.loads(report.read_text())
    assert (result["documents"], result["vocab_size"], result["longest"]) == (30, 257, 9)
    assert [sample["text"] for sample in result["samples"]] == ["story 0", "story 29"]


def test_faults_are_exit_code_3(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "o")
    source.write_text("{broken\n")
    assert main(["data", "prepare", str(source), "--output", output]) == 3
    assert "in.jsonl:1: invalid JSON" in capsys.readouterr().err
    assert main(["data", "inspect", output]) == 3
    assert "o.idx: does not exist" in capsys.readouterr().err


def test_inspect_sees_changed_content(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "o")
    assert prepare_main([str(source), "--output", output]) == 0
    path = tmp_path / "o.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    assert inspect_main([output]) == 0
    assert main(["data", "inspect", output, "--verify"]) == 3
    assert "o.bin: sha256 differs" in capsys.readouterr().err


def test_json_on_standard_output(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "o")
    assert prepare_main([str(source), "--output", output, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 30
    assert inspect_main([output, "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["documents"] == 30 and "documents" in shown.err


@pytest.mark.parametrize("command", [prepare_main, inspect_main])
def test_help_has_examples(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command(["--help"])  # type: ignore[operator]
    assert caught.value.code == 0
    assert "examples:\n  moe-train data" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown(terminal: bool) -> None:
    out = io.StringIO()
    with PrepareProgress(Console(file=out, force_terminal=terminal, width=200)) as console:
        console.report(Progress(4, done=1, stage="tokenize"))
        for done in (2, 3, 4):
            console.report(Progress(4, done, documents=12345, stage="tokenize"))
        console.report(Progress(4, 4, documents=12345, stage="merge"))
    text = out.getvalue()
    assert "12,345 documents" in text
    assert ("\x1b[" in text) == terminal
    assert terminal or text.count("\n") == 2, "one line a stage, since no time went by"
