"""metrics.jsonl: exact values, one line a step, and no step twice after a resume."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.errors import DataError
from moe_train.run_folder.metrics import MetricsLog, hex_float, read


def train_line(step: int, loss: float = 1.0) -> dict[str, float | int]:
    return {"step": step, "loss": loss, "grad_norm": 0.5}


@given(st.floats(allow_nan=False))
def test_hex_twin_is_exact(value: float) -> None:
    assert float.fromhex(hex_float(value)) == value


def test_lines_round_trip_with_their_twins(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(train_line(1, 0.1))
        log.append({"step": 1, "valid_loss": 0.25})
    first, second = read(path)
    assert first["loss"] == 0.1 and first["loss_hex"] == (0.1).hex()
    assert first["grad_norm_hex"] == (0.5).hex()
    assert second == {"step": 1, "valid_loss": 0.25, "valid_loss_hex": (0.25).hex()}


def test_every_line_is_strict_json_even_for_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
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
        "from moe_train.run_folder.metrics import MetricsLog\n"
        f"log = MetricsLog(pathlib.Path({str(path)!r}))\n"
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
    with MetricsLog(path) as log:
        log.append(train_line(1))
        log.append(train_line(2))
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)
    assert [record["step"] for record in read(path)] == [1, 2]
    with MetricsLog(path) as log:
        log.append(train_line(3))
    assert [record["step"] for record in read(path)] == [1, 2, 3]


def test_a_torn_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        MetricsLog(path)


@given(steps=st.integers(1, 12), every=st.integers(1, 4), back=st.integers(0, 12))
def test_truncation_leaves_each_step_once(
    tmp_path_factory: pytest.TempPathFactory, steps: int, every: int, back: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, steps + 1):
            log.append(train_line(step, step + 0.125))
            if step % every == 0:
                log.append({"step": step, "valid_loss": 1.0})
    before = path.read_text().splitlines()
    with MetricsLog(path) as log:
        dropped = log.truncate_after(back)
        kept = path.read_text().splitlines()
        assert kept == before[: len(before) - dropped]
        assert all(json.loads(line)["step"] <= back for line in kept)
        assert all(json.loads(line)["step"] > back for line in before[len(kept) :])
        log.append(train_line(min(back, steps) + 1))
    trained = [record["step"] for record in read(path) if "loss" in record]
    assert trained == list(range(1, min(back, steps) + 2))


def test_a_repeated_step_is_our_own_mistake(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append(train_line(2))
        with pytest.raises(AssertionError, match="truncate_after"):
            log.append(train_line(2))


def test_truncation_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.append(train_line(step))
    before = path.read_text()
    log = MetricsLog(path)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        log.truncate_after(1)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
