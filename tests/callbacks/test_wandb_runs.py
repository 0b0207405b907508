"""Whole runs beside a W&B that hangs, raises, dies or is not there: same losses, same pace.

A fake client is a module called wandb that comes first on the path of W&B's process.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moe_train.run_folder.metrics import read
from moe_train.testing.layouts import SMALL
from moe_train.testing.world import run_world

pytestmark = pytest.mark.world
CLIENT = """
import os, pathlib, time
def called(what):
    with pathlib.Path(os.environ["SEEN"]).open("a") as file:
        file.write(what + "\\n")
class Settings:
    def __init__(self, **options): pass
class Run:
    summary = {}
    def define_metric(self, *names, **options): pass
    def log(self, record): called("log")
    def finish(self, exit_code): called("finish")
def init(mode, **options):
    called(mode)
    return Run()
"""
# A hang is longer than a test may take: a step that waited for it would never end.
HANG = "time.sleep(3600)"
FAULTS = {
    "hangs in every record": f"Run.log = lambda self, r: (called('fault'), {HANG})",
    "raises in every record": "Run.log = lambda self, r: (called('fault'), 1 / 0)",
}
MORE = {
    "hangs at once": f"called('fault'); {HANG}",
    "hangs when opened": f"init = lambda mode, **o: (called('fault'), {HANG})",
    "hangs at the end": f"Run.finish = lambda self, exit_code: (called('fault'), {HANG})",
    "cannot be imported": "called('fault'); raise ImportError('broken install')",
    "refuses": "init = lambda mode, **o: (called('fault'), 1 / 0)",
    "dies": "Run.log = lambda self, r: (called('fault'), os._exit(3))",
}
STEPS = 30
NOISE = 10.0
"""Between two medians on a machine that runs other tests too; a client that hangs blocks for
minutes, thousands of times a step."""


def paced(rank: int, world: int, arguments: list[str], env: dict[str, str], result: str) -> int:
    """Train, and note when each step begins: what lies between has the callbacks in it."""
    os.environ.update(env)
    from moe_train.run.main import main
    from moe_train.run_folder.metrics import JsonLines
    from moe_train.train import loop

    plain, append = loop.train_step, JsonLines.append
    begun: list[float] = []

    def step(*args: Any, **options: Any) -> Any:
        begun.append(time.perf_counter())
        return plain(*args, **options)

    def padded(self: Any, record: Mapping[str, Any]) -> None:
        # More than a pipe holds: nothing but a file may lie between the step and the client.
        append(self, {**record, "padding": "x" * 100_000})

    loop.train_step = step
    JsonLines.append = padded  # type: ignore[method-assign]
    code = main(arguments)
    Path(result).write_text(json.dumps(begun))
    return code


def pace(folder: Path, mode: str, client: str = "", **env: str) -> tuple[list[str], float, str]:
    """Loss of every step in hexadecimal, median seconds from step to step, and what was said."""
    (folder / "fake").mkdir()
    (folder / "fake" / "wandb.py").write_text(CLIENT + client)
    env |= {"PYTHONPATH": str(folder / "fake"), "SEEN": str(folder / "seen")}
    overrides = [
        *SMALL,
        "device=cpu",
        "log.console=lines",
        f"train.steps={STEPS}",
        "batch.global=2",
    ]
    overrides += [f"log.wandb={mode}", f"run.dir={folder}", "run.name=run"]
    log, result = folder / "log", folder / "begun.json"
    codes = run_world(paced, 1, overrides, env, str(result), log=log)
    assert codes == [0], log.read_text()
    lines = [line for line in read(folder / "run" / "metrics.jsonl") if "loss_hex" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    between = [after - before for before, after in pairwise(json.loads(result.read_text()))]
    return [line["loss_hex"] for line in lines], statistics.median(between), log.read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str], float], None]:
    """Compares losses and pace with a run without W&B."""
    losses, between, _ = pace(tmp_path_factory.mktemp("alone"), "disabled")

    def assert_pace(others: list[str], pace: float) -> None:
        assert others == losses
        assert pace < NOISE * between, f"{pace:.4f} s from step to step, {between:.4f} s alone"

    return assert_pace


@pytest.mark.parametrize(
    "fault",
    [*FAULTS.values(), *(pytest.param(fault, marks=pytest.mark.full) for fault in MORE.values())],
    ids=[*FAULTS, *MORE],
)
def test_a_client_that_fails(
    tmp_path: Path, alone: Callable[[list[str], float], None], fault: str
) -> None:
    losses, between, output = pace(tmp_path, "offline", fault)
    alone(losses, between)
    assert "fault" in (tmp_path / "seen").read_text().split(), "the fault never came"
    assert "W&B: " in output


def test_a_server_that_does_not_answer(
    tmp_path: Path, alone: Callable[[list[str], float], None]
) -> None:
    with ExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        # Its queue is full: a further connection is neither refused nor accepted.
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(silent.getsockname())
        env = {"WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        losses, between, output = pace(tmp_path, "online", WANDB_API_KEY="k" * 40, **env)
    alone(losses, between)
    assert "unreachable" in output
    assert (tmp_path / "seen").read_text().split()[0] == "offline"
