"""A rank that stops: the others end and name it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_train.errors import EXIT_HUNG
from moe_train.run.watchdog import Watchdog
from moe_train.run_folder.status import read_status
from moe_train.testing.runs import QUIET
from moe_train.testing.world import run_world

SMALL = [
    *("parallel=single", "parallel.pipeline=2", "parallel.expert=2", "parallel.tensor=2"),
    *("recompute=none", "model.layers=2", "model.hidden=32", "model.heads=4", "model.head_dim=8"),
    *("model.experts=4", "model.expert_hidden=24", "data.sequence=16", "batch.global=4"),
    *("checkpoint.every=0", "train.eval_every=0", "train.steps=4", "backend.timeout_seconds=6"),
]


def stops(rank: int, world: int, args: list[str], mute: int) -> int:
    """Train; rank `mute` is stopped in its second step, as by a debugger or a lost disk."""
    from moe_train.run.main import main
    from moe_train.train import loop

    plain = loop.train_step

    def step(engine: Any, batches: Any, number: int, **how: Any) -> Any:
        if rank == mute and number == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        return plain(engine, batches, number, **how)

    loop.train_step = step
    return main(args)


@pytest.mark.world
@pytest.mark.parametrize("mute", [pytest.param(0, marks=pytest.mark.full), 3])
def test_a_stopped_rank_is_named_and_ends_the_others(tmp_path: Path, mute: int) -> None:
    overrides = [*QUIET, *SMALL, f"run.dir={tmp_path}", "run.name=run"]
    log, folder = tmp_path / "ranks.log", tmp_path / "run"
    outcomes = run_world(stops, 4, overrides, mute, log=log, tolerate=True, unawaited=[mute])
    output = log.read_text()
    assert output.count(f"rank {mute}: heartbeat stale for") == 1, output
    assert "step 2, training step" in output and "Traceback" not in output
    codes = [outcome.value for rank, outcome in enumerate(outcomes) if rank != mute]
    assert set(codes) <= {EXIT_HUNG, None}
    status = read_status(folder / "status.json")
    assert status is not None and status.state == "failed" and f"rank {mute}" in status.reason
    stacks = list((folder / "logs").glob("rank_*.stacks"))
    assert stacks and "train_step" in stacks[0].read_text()


def test_progress_keeps_it_quiet_and_a_standstill_does_not(tmp_path: Path) -> None:
    lines: list[str] = []
    beat = tmp_path / "rank_0.beat"
    with Watchdog(tmp_path, 0, 1, 0.4, lines.append) as watchdog:
        inode = beat.stat().st_ino
        for step in range(12):
            with watchdog.phase("training step", step):
                time.sleep(0.05)
        assert not lines
        # Overwritten in place: a rename each time is what shared file systems are slow at.
        assert beat.stat().st_ino == inode
        with watchdog.phase("validation", 12):
            deadline = time.monotonic() + 20
            while not lines and time.monotonic() < deadline:
                time.sleep(0.05)
    assert len(lines) == 1 and "step 12, validation" in lines[0]
    assert not list(tmp_path.glob("*.beat"))


BLOCKED = """
import logging, os, sys
from functools import partial
from pathlib import Path
from moe_train.run import failure, watchdog
from moe_train.run.state import RunState
from moe_train.run_folder.folder import RunFolder

class Pipe(logging.Handler):
    def emit(self, record):
        os.read(os.pipe()[0], 1)  # never written to: returns never

logging.getLogger().addHandler(Pipe())
folder, where = RunFolder(Path(sys.argv[1])), sys.argv[2]
if where == "logging":
    failure.LOG_SECONDS = 0.2
else:
    watchdog.HANG_REPORT_SECONDS = 0.2
    failure.write_status = lambda *args: os.read(os.pipe()[0], 1)
end = partial(failure.exit_hung, folder, RunState(step=3))
with watchdog.Watchdog(folder.logs, 0, 1, 0.2, end):
    logging.error("the main thread waits here and holds the handler's lock")
"""


@pytest.mark.parametrize("where", ["logging", "status"])
def test_a_rank_blocked_in_a_log_handler_or_by_its_file_system_exits(
    tmp_path: Path, where: str
) -> None:
    (tmp_path / "logs").mkdir()
    command = [sys.executable, "-c", BLOCKED, str(tmp_path), where]
    assert subprocess.run(command, timeout=60).returncode == EXIT_HUNG
    status = read_status(tmp_path / "status.json")
    if where == "status":
        assert status is None
    else:
        assert status is not None and (status.state, status.step) == ("failed", 3)
        assert "no progress for" in status.reason
    assert "no progress for" in (tmp_path / "logs" / "cause").read_text()


def test_the_one_behind_is_named(tmp_path: Path) -> None:
    lines: list[str] = []
    (tmp_path / "rank_1.beat").write_text('{"step": 3, "phase": "data", "count": 0}')
    with (
        Watchdog(tmp_path, 0, 2, 0.3, lines.append) as watchdog,
        watchdog.phase("training step", 4),
    ):
        deadline = time.monotonic() + 20
        while not lines and time.monotonic() < deadline:
            (tmp_path / "rank_1.beat").touch()
            time.sleep(0.05)
    assert "rank 1 is behind, at step 3, data" in lines[0]
