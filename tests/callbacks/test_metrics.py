"""metrics.jsonl: exact values, one line a step, and no step twice after a resume."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.callbacks.recorders import ExpertLoad, MetricsRecorder, StatusWriter
from moe_train.errors import DataError
from moe_train.run_folder.metrics import JsonLines, hex_float, read
from tests.support import events


def open_log(path: Path, step: int = 1 << 40) -> closing[JsonLines]:
    return closing(JsonLines(path, step))


def train_line(step: int, loss: float = 1.0) -> dict[str, float | int]:
    return {"step": step, "loss": loss, "grad_norm": 0.5}


@given(st.floats(allow_nan=False))
def test_hex_twin_is_exact(value: float) -> None:
    assert float.fromhex(hex_float(value)) == value


def test_lines_round_trip_with_their_twins(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_log(path) as log:
        log.append(train_line(1, 0.1))
        log.append({"step": 1, "valid_loss": 0.25})
    first, second = read(path)
    assert first["loss"] == 0.1 and first["loss_hex"] == (0.1).hex()
    assert first["grad_norm_hex"] == (0.5).hex()
    assert second == {"step": 1, "valid_loss": 0.25, "valid_loss_hex": (0.25).hex()}


def test_every_line_is_strict_json_even_for_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_log(path) as log:
        log.append(train_line(1, math.nan))
        log.append(train_line(2, math.inf))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [line["loss"] for line in lines] == [None, None]
    assert [line["loss_hex"] for line in lines] == ["nan", "inf"]


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    """A rank that is killed between two steps has lost no line."""
    path = tmp_path / "metrics.jsonl"
    script = (
        "import os, signal, pathlib\n"
        "from moe_train.run_folder.metrics import JsonLines\n"
        f"log = JsonLines(pathlib.Path({str(path)!r}), 0)\n"
        "log.append({'step': 1, 'loss': 2.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", script], env=env).returncode == -signal.SIGKILL
    assert [record["step"] for record in read(path)] == [1]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "\ufffd"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_log(path) as log:
        log.append(train_line(1))
        log.append(train_line(2))
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)
    assert [record["step"] for record in read(path)] == [1, 2]
    with open_log(path) as log:
        log.append(train_line(3))
    assert [record["step"] for record in read(path)] == [1, 2, 3]


def test_a_torn_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        MetricsRecorder(path, 0.0).on_start(events.start(step=3))


@settings(deadline=None)
@given(steps=st.integers(1, 12), every=st.integers(1, 4), back=st.integers(0, 12))
def test_truncation_leaves_each_step_once(
    tmp_path_factory: pytest.TempPathFactory, steps: int, every: int, back: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    with open_log(path) as log:
        for step in range(1, steps + 1):
            log.append(train_line(step, step + 0.125))
            if step % every == 0:
                log.append({"step": step, "valid_loss": 1.0})
    before = path.read_text().splitlines()
    with open_log(path, back) as log:
        remaining = path.read_text().splitlines()
        assert remaining == [line for line in before if json.loads(line)["step"] <= back]
        log.append(train_line(min(back, steps) + 1))
    trained = [record["step"] for record in read(path) if "loss" in record]
    assert trained == list(range(1, min(back, steps) + 2))


def test_a_repeated_step_is_our_own_mistake(tmp_path: Path) -> None:
    with open_log(tmp_path / "metrics.jsonl") as log:
        log.append(train_line(2))
        with pytest.raises(AssertionError, match="truncate_after"):
            log.append(train_line(2))


def test_a_start_reads_only_the_end_of_a_long_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokens.jsonl grows to gigabytes; a resume must not parse it."""
    path = tmp_path / "tokens.jsonl"
    line = '{{"step": {}, "tokens": [' + ", ".join(["1024"] * 100) + "]}}\n"
    path.write_text("".join(line.format(step) for step in range(1, 1001)))
    whole, parsed = path.read_bytes(), []
    plain = json.loads

    def counted(text: bytes) -> object:
        parsed.append(text)
        return plain(text)

    monkeypatch.setattr(json, "loads", counted)
    ExpertLoad(path).on_start(events.start(step=997))
    assert len(parsed) == 4
    assert path.read_bytes() == whole[: whole.index(b'{"step": 998,')]


def test_status_is_written_now_and_then_and_waits_for_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now = tmp_path / "status.json", [100.0]
    replaced: list[object] = []
    replace = os.replace

    def counted(*paths: object) -> None:
        replaced.append(paths)
        replace(*paths)  # type: ignore[arg-type]

    def refuse(file: int) -> None:
        raise AssertionError("fsync")

    monkeypatch.setattr(os, "replace", counted)
    monkeypatch.setattr(os, "fsync", refuse)
    status = StatusWriter(path, lambda: now[0])
    status.on_start(events.start())
    for step in range(1, 101):
        now[0] += 0.125
        status.on_step(events.step(step))
    assert len(replaced) == 2, "12.5 seconds at one update in 5"
    assert json.loads(path.read_text()) == {"state": "running", "step": 80, "reason": ""}
