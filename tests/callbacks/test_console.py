"""The console: a bar on a terminal, plain lines elsewhere, and the summary at the end."""

from __future__ import annotations

import errno
import logging
import os
import pty
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_train.callbacks.progress import ConsoleProgress, step_figures
from moe_train.callbacks.recorders import MetricsRecorder
from moe_train.callbacks.summary import RunSummary, summarise, summary_rows
from moe_train.run.logs import logging_to_console
from moe_train.train.callback import EndEvent
from tests.support import events

RECORDS = [
    {"step": 1, "loss": 8.5, "tokens_per_second": 10.0, "mfu": 0.01, "step_seconds": 20.0},
    {"step": 2, "loss": 7.0, "tokens_per_second": 1000.0, "mfu": 0.3, "step_seconds": 2.0},
    {"step": 2, "valid_loss": 6.9},
    {"step": 3, "loss": 6.0, "tokens_per_second": 1200.0, "mfu": 0.4, "step_seconds": 2.0},
    {"step": 4, "loss": 5.25, "tokens_per_second": 1100.0, "mfu": 0.35, "step_seconds": 2.0},
    {"step": 4, "valid_loss": 5.5},
]


def summary(entropy: float = 6.25) -> RunSummary:
    return summarise(
        [r | {"unigram_entropy": entropy} if "valid_loss" in r else r for r in RECORDS],
        state="finished",
        wall_seconds=65.2,
        run_folder=Path("runs") / ("long-" * 40 + "name"),
    )


def console(mode: str, log_every: int = 1) -> ConsoleProgress:
    metrics = MetricsRecorder(Path("metrics.jsonl"), 0.0)
    metrics.summary = summary()
    return ConsoleProgress(mode, log_every, metrics)


def play(mode: str, log_every: int = 1) -> None:
    """A run whose log goes to this process's console."""
    entropy = {"unigram_entropy": 6.25}
    with logging_to_console():
        records = [r | entropy if "valid_loss" in r else r for r in RECORDS]
        events.play(console(mode, log_every), records)


def test_lines_on_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert console("auto").mode == "lines"
    play("auto", 3)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "\x1b" not in text
    # Every third step and the last one.
    steps = [line for line in lines if line.startswith("step") and "/4" in line]
    assert [line.split()[1] for line in steps] == ["3/4", "4/4"]
    assert "loss 6.0000" in steps[0] and "tokens/s 1,200" in steps[0] and "MFU 40.0%" in steps[0]
    assert "left 0:00:02" in steps[0], "the slow first step must not weigh on the remaining time"
    assert any("validation loss 5.5000" in x and "entropy 6.2500" in x for x in lines)
    # The folder stays on one line, so that it can be copied.
    assert lines[-1].endswith(str(summary().run_folder))


@pytest.mark.parametrize("mode", ["none", "lines"])
def test_the_log_file_has_the_lines_in_every_mode(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    caplog.set_level(logging.INFO)
    events.play(console(mode), RECORDS)
    assert sum("loss 5.2500" in record.getMessage() for record in caplog.records) == 1
    play(mode)
    assert (capsys.readouterr().out == "") is (mode == "none")


def seen_on(master: int) -> str:
    """Everything that comes out of a terminal until its other end is closed."""
    pieces = []
    while True:
        try:
            piece = os.read(master, 1 << 12)
        except OSError as end:
            assert end.errno == errno.EIO
            piece = b""
        if not piece:
            return b"".join(pieces).decode()
        pieces.append(piece)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    master, slave = pty.openpty()
    with ThreadPoolExecutor(1) as pool:
        # A terminal takes what is written only while somebody looks.
        looking = pool.submit(seen_on, master)
        with os.fdopen(slave, "w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert console("auto").mode == "bar"
            play("auto")
        shown = looking.result()
    os.close(master)
    assert "4/4" in shown and "loss 5.2500" in shown and "validation loss 6.9000" in shown
    assert "\x1b[?25h" in shown, "the cursor must be shown again"


def test_an_interrupted_bar_gives_the_terminal_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    bar = console("bar")
    bar.on_start(events.start(step=2))
    bar.on_end(EndEvent(KeyboardInterrupt()))
    bar.on_end(EndEvent(KeyboardInterrupt()))
    assert capsys.readouterr().out.count("\x1b[?25h") == 1


def test_forced_routing_is_labelled() -> None:
    assert "forced" in step_figures({"loss": 1.0, "force_balance": True})


def test_a_resumed_run_counts_the_steps_that_are_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    resumed = console("lines")
    resumed.on_start(events.start(step=7, steps=10))
    resumed.on_step(events.step(8, step_seconds=30.0))
    assert "left 0:01:00" in caplog.text


def test_summary_figures() -> None:
    result = summary()
    assert (result.step, result.first_loss, result.last_loss) == (4, 8.5, 5.25)
    assert result.valid_loss == 5.5
    assert result.tokens_per_second == 1100.0, "the median without the first step"
    rows = dict(summary_rows(result))
    assert rows["training loss"] == "8.5000 -> 5.2500"
    assert "below the unigram entropy 6.2500" in rows["validation loss"]
    assert rows["wall time"] == "0:01:05"


def test_summary_is_honest_about_a_model_that_learned_nothing() -> None:
    assert "not below" in dict(summary_rows(summary(entropy=5.0)))["validation loss"]


def test_summary_of_a_run_that_made_no_step() -> None:
    result = summarise([], state="failed", wall_seconds=1.0, run_folder=Path("runs/x"))
    assert [label for label, _ in summary_rows(result)] == ["run", "wall time", "run folder"]
