"""The W&B follower: the real client offline, and clients that hang, raise, die or refuse.

A fake client is a module called wandb that comes first on the path of W&B's process.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_train.callbacks import wandb
from moe_train.callbacks.recorders import MetricsRecorder
from moe_train.callbacks.summary import summarise
from moe_train.callbacks.wandb import WandbFollower, has_key
from moe_train.run_folder.folder import RunFolder
from moe_train.run_folder.metrics import JsonLines
from moe_train.train.callback import EndEvent
from tests.support import events

RECORDER = """
import json, os, pathlib, time
SEEN = pathlib.Path(os.environ["SEEN"])
def note(*what):
    with SEEN.open("a") as file:
        file.write(json.dumps(what) + "\\n")
class Settings:
    def __init__(self, **options): pass
class Summary:
    def update(self, values): note("summary", values)
class Run:
    summary = Summary()
    def define_metric(self, *a, **k): pass
    def log(self, record): note("log", record)
    def finish(self, exit_code): note("finish", exit_code)
def init(mode, **options):
    options.pop("settings")
    note("init", mode, options)
    return Run()
"""


class Bench:
    """A run folder whose metrics.jsonl W&B follows, and everything that was said about it."""

    def __init__(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.path, self.folder, self._caplog = path, RunFolder(path), caplog
        self.folder.logs.mkdir()
        self.metrics = MetricsRecorder(self.folder.metrics, 0.0)

    @property
    def warnings(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records]

    def start(self, mode: str, config: Mapping[str, Any] | None = None) -> None:
        self.lines = JsonLines(self.folder.metrics, 1 << 40)
        self.follower = WandbFollower(
            mode,
            project="p",
            folder=self.folder,
            config=config or {"model": {"layers": 16}},
            metrics=self.metrics,
        )
        self.follower.on_start(events.start())

    def log(self, *steps: int, **values: float | str) -> None:
        for step in steps:
            self.lines.append({"step": step, "loss": 1.0 / step} | values)
            self.follower.on_step(events.step(step))

    def end(self, error: BaseException | None = None) -> None:
        self.follower.on_end(EndEvent(error))

    def seen(self, kind: str = "") -> list[list[Any]]:
        path = self.path / "seen.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for line in lines if (entry := json.loads(line))[0].startswith(kind)]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < until, "it did not come to pass"
            time.sleep(0.02)
            self.follower.on_step(events.step(1))


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Bench:
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.jsonl"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return Bench(tmp_path, caplog)


@pytest.fixture
def client(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def install(extra: str = "") -> None:
        path = bench.path / "fake"
        path.mkdir()
        (path / "wandb.py").write_text(RECORDER + extra)
        monkeypatch.setenv("PYTHONPATH", str(path))

    return install


def test_disabled_starts_nothing(bench: Bench) -> None:
    bench.start("disabled")
    bench.log(1)
    bench.end()
    assert not bench.folder.wandb.exists() and bench.warnings == []


def test_the_real_client_keeps_an_offline_copy(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "FINISH_SECONDS", 60.0)
    bench.start("auto")
    bench.log(1, 2, 3)
    bench.metrics.summary = summarise(
        [{"step": 3, "valid_loss": 0.5}],
        state="finished",
        wall_seconds=1.0,
        run_folder=bench.path,
    )
    bench.end()
    assert bench.warnings == []
    copies = list(bench.folder.wandb.glob("offline-run-*/*.wandb"))
    assert len(copies) == 1 and copies[0].stat().st_size > 0
    content = copies[0].read_bytes()
    assert b"valid_loss" in content and b"layers" in content


def test_records_and_exit_code_arrive_in_order(bench: Bench, client: Callable[[str], None]) -> None:
    client("")
    bench.start("offline")
    bench.log(1, loss=float("nan"), name="x")
    bench.lines.append({"step": 1, "valid_loss": 2.0})
    bench.log(2)
    bench.end(ZeroDivisionError())
    assert [entry[0] for entry in bench.seen()] == ["init", *["log"] * 3, "summary", "finish"]
    assert bench.seen("finish") == [["finish", 1]]
    first, *others = (entry[1] for entry in bench.seen("log"))
    assert math.isnan(first.pop("loss")) and first == {"step": 1, "name": "x"}
    assert others == [{"step": 1, "valid_loss": 2.0}, {"step": 2, "loss": 0.5}]
    assert bench.seen("init")[0][2]["config"] == {"model": {"layers": 16}}
    assert bench.warnings == []


def test_a_config_larger_than_an_argument_may_be_arrives(
    bench: Bench, client: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Online and refused: the second start, offline, gets it too."""
    client("")
    config = {"data": {"train": [f"/datasets/part_{part:05}/tokens" for part in range(8000)]}}
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        bench.start("online", config)
        bench.end()
    [[_, mode, options]] = bench.seen("init")
    assert mode == "offline" and options["config"] == config


def test_a_resumed_run_continues_the_same_copy_without_duplicate_steps(
    bench: Bench, client: Callable[[str], None]
) -> None:
    client("")
    for resumed_at, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        JsonLines(bench.folder.metrics, resumed_at).close()
        bench.start("offline")
        bench.log(*steps)
        bench.end()
    ids = [entry[2]["id"] for entry in bench.seen("init")]
    assert len(ids) == 2 and len(set(ids)) == 1
    assert [entry[1]["step"] for entry in bench.seen("log")] == [1, 2, 3, 4]


def test_steps_after_a_rollback_are_logged_once(
    bench: Bench, client: Callable[[str], None]
) -> None:
    client("")
    bench.start("offline")
    bench.log(1, 2, 3)
    bench.wait_for(lambda: len(bench.seen("log")) == 3)
    bench.lines.truncate_after(1)
    bench.log(2, 3, 4, 5)
    bench.end()
    assert [entry[1]["step"] for entry in bench.seen("log")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("def init(mode, **o): raise RuntimeError('no such entity')", "no such entity"),
        ("raise ImportError('broken install')", "broken install"),
        ("def init(mode, **o): os._exit(3)", "ended unexpectedly"),
        ("Run.log = lambda self, r: 1 / 0", "ZeroDivisionError"),
        ("Run.finish = lambda self, exit_code: os._exit(3)", "ended unexpectedly"),
    ],
)
def test_a_client_that_fails_costs_the_copy_only(
    bench: Bench, client: Callable[[str], None], fault: str, message: str
) -> None:
    client(fault)
    bench.start("offline")
    bench.log(1)
    if "finish" not in fault:
        bench.wait_for(lambda: bool(bench.warnings))
    bench.log(2)
    bench.end()
    assert len(bench.warnings) == 1 and message in bench.warnings[0]
    assert bench.warnings[0].startswith("W&B: ") and "metrics.jsonl" in bench.warnings[0]


HANG = "def init(mode, **o):\n    note('hangs', os.getpid())\n    time.sleep(600)"


def test_a_client_that_hangs_blocks_neither_steps_nor_the_end(
    bench: Bench, client: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "FINISH_SECONDS", 1.0)
    client(HANG)
    bench.start("offline")
    bench.wait_for(lambda: bool(bench.seen()))
    slowest = 0.0
    for step in range(1, 200):
        before = time.monotonic()
        bench.log(step, padding="x" * 4096)
        slowest = max(slowest, time.monotonic() - before)
    before = time.monotonic()
    bench.end()
    # Both bounds are far below the 600 s of the hang and far above any scheduling noise.
    assert slowest < 5 and time.monotonic() - before < 20
    assert len(bench.warnings) == 1 and "did not finish" in bench.warnings[0]
    with pytest.raises(ProcessLookupError):
        os.kill(bench.seen()[0][1], 0)


def test_a_hung_client_does_not_keep_a_killed_run_alive(
    bench: Bench, client: Callable[[str], None]
) -> None:
    """A run that ends without on_end: the interpreter must still end."""
    client(HANG)
    bench.folder.metrics.touch()
    script = (
        "import pathlib, time\n"
        "from moe_train.callbacks.wandb import WandbFollower\n"
        "from moe_train.run_folder.folder import RunFolder\n"
        f"folder = RunFolder(pathlib.Path({str(bench.path)!r}))\n"
        "WandbFollower('offline', project='p', folder=folder, config={}, metrics=None)"
        ".on_start(None)\n"
        "while not (folder.path / 'seen.jsonl').exists(): time.sleep(0.02)\n"
        "raise SystemExit(7)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{root}"},
        timeout=60,
    )
    assert done.returncode == 7
    os.kill(bench.seen()[0][1], signal.SIGKILL)


def test_a_killed_process_is_reported(bench: Bench, client: Callable[[str], None]) -> None:
    client("def init(mode, **o):\n    note('init', os.getpid())\n    return Run()")
    bench.start("offline")
    bench.wait_for(lambda: bool(bench.seen()))
    os.kill(bench.seen()[0][1], signal.SIGKILL)
    bench.wait_for(lambda: bool(bench.warnings))
    bench.log(1, 2, 3)
    bench.end()
    assert len(bench.warnings) == 1 and "ended unexpectedly" in bench.warnings[0]


def test_online_without_a_key_is_loud_and_asks_nobody(
    bench: Bench, client: Callable[[str], None]
) -> None:
    client("")
    bench.start("online")
    bench.end()
    assert "no key" in bench.warnings[0]
    assert [entry[1] for entry in bench.seen("init")] == ["offline"]


@pytest.mark.parametrize("mode", ["online", "auto"])
def test_an_unreachable_server_is_named_and_the_copy_kept_offline(
    bench: Bench, client: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    client("")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        bench.start(mode)
        bench.log(1)
        bench.end()
    assert url in bench.warnings[0] and "unreachable" in bench.warnings[0]
    assert "wandb sync" in bench.warnings[0]
    assert [entry[1] for entry in bench.seen("init")] == ["offline"]
    assert bench.seen("log") == [["log", {"step": 1, "loss": 1.0}]]


def test_a_server_that_refuses_leaves_an_offline_copy(
    bench: Bench, client: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    client(
        "offline_init = init\n"
        "def init(mode, **o):\n"
        "    if mode == 'online': raise RuntimeError('permission denied')\n"
        "    return offline_init(mode, **o)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        bench.start("online")
        bench.log(1)
        bench.end()
    assert "permission denied" in bench.warnings[0]
    assert [entry[1] for entry in bench.seen("init")] == ["offline"] and bench.seen("log")


def test_a_reachable_server_is_used(
    bench: Bench, client: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    client("")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        bench.start("auto")
        bench.end()
    assert [entry[1] for entry in bench.seen("init")] == ["online"] and bench.warnings == []


def test_keys_are_found_where_wandb_keeps_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_key()
    path = bench.path / "netrc"
    path.write_text("machine api.wandb.ai login user password secret\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_key()
