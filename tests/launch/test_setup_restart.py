"""Ranks that torchrun starts again: what was told to stop stays stopped, what failed goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from moe_train.errors import EXIT_CHECKPOINT, EXIT_PREEMPTED
from moe_train.run.signals import SIGNALS, SignalHandler
from moe_train.run_folder.metrics import read
from moe_train.run_folder.status import read_status
from moe_train.testing.layouts import SMALL
from moe_train.testing.runs import QUIET
from moe_train.testing.world import run_world


def test_a_request_is_heard_where_it_was_ignored_until_then() -> None:
    """Launchers ignore USR1 for their ranks while these are being started."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with SignalHandler() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.received == signal.SIGUSR1
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
    finally:
        # Who has been told to stop hears nothing more: here that would be all the other tests.
        for number, handler in before.items():
            signal.signal(number, handler)


def start(rank: int, world: int, args: list[str], count: int, stop_at: int) -> int:
    """Train as torchrun's start number ``count``; rank 1 is told to stop after some steps."""
    os.environ.update(TORCHELASTIC_RESTART_COUNT=str(count), TORCHELASTIC_MAX_RESTARTS="3")
    from moe_train.run.main import main

    [parent] = [word.partition("=")[2] for word in args if word.startswith("run.dir=")]

    def stop() -> None:
        while not any(len(read(path)) >= stop_at for path in Path(parent).glob("*/metrics.jsonl")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    if stop_at and rank == 1:
        threading.Thread(target=stop, daemon=True).start()
    return main(args)


@pytest.mark.world
@pytest.mark.parametrize("named", [True, False])
def test_a_preempted_run_is_left_alone_by_restarts(tmp_path: Path, named: bool) -> None:
    overrides = [
        *QUIET,
        *SMALL,
        "parallel.expert=2",
        "checkpoint.every=1000",
        f"run.dir={tmp_path}",
    ]
    overrides += ["run.name=mine"] if named else []
    log = tmp_path / "log"

    def world(count: int, *more: str, stop_at: int = 0) -> list[int]:
        codes: list[int] = run_world(start, 2, [*overrides, *more], count, stop_at, log=log)
        return codes

    assert world(0, stop_at=3) == [EXIT_PREEMPTED] * 2, log.read_text()
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    left = {name: (folder / name).read_bytes() for name in ("status.json", "metrics.jsonl")}
    assert world(1) == [EXIT_PREEMPTED] * 2
    assert log.read_text().count("a restart of its ranks does not resume it") == 1
    assert left == {name: (folder / name).read_bytes() for name in left}
    # A later job that fails before it takes the run up is not what was told to stop.
    assert world(0, "model.hidden=32") == [EXIT_CHECKPOINT] * 2
    status = read_status(folder / "status.json")
    assert status is not None and status.state == "preempted"
    assert world(1) == [0, 0], log.read_text()
    assert [line["step"] for line in read(folder / "metrics.jsonl")] == list(range(1, 21))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]
