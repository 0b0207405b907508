"""The W&B mirror: the real client offline, and clients that hang, raise, die or stay deaf.

A fake client is a module called wandb that comes first on the path of the mirror's process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.callbacks import wandb as mirror
from moe_train.callbacks.wandb import Mirror, has_key

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
    """A mirror in a folder of its own, and everything that it said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []

    def start(self, mode: str) -> Mirror:
        return Mirror(
            mode,
            project="p",
            name="n",
            folder=self.folder / "wandb",
            config={"model": {"layers": 16}},
            warn=self.warnings.append,
            log=self.folder / "wandb.log",
        )

    def seen(self) -> list[list[object]]:
        path = self.folder / "seen.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.jsonl"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return Bench(tmp_path)


@pytest.fixture
def client(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def install(extra: str = "") -> None:
        path = bench.folder / "fake"
        path.mkdir()
        (path / "wandb.py").write_text(RECORDER + extra)
        monkeypatch.setenv("PYTHONPATH", str(path))

    return install


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.02)


def test_disabled_starts_nothing(bench: Bench) -> None:
    found = bench.start("disabled")
    found.log({"step": 1})
    found.finish(5)
    assert found.state == "disabled" and list(bench.folder.iterdir()) == []


def test_the_real_client_keeps_an_offline_copy(bench: Bench) -> None:
    found = bench.start("auto")
    for step in range(1, 4):
        found.log({"step": step, "loss": 1.0 / step})
    found.summary({"valid_loss": 0.5})
    found.finish(60)
    assert found.state == "offline" and bench.warnings == []
    copies = list((bench.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(copies) == 1 and copies[0].stat().st_size > 0
    content = copies[0].read_bytes()
    assert b"valid_loss" in content and b"layers" in content


def test_records_summary_and_exit_code_arrive_in_order(
    bench: Bench, client: Callable[[str], None]
) -> None:
    client("")
    found = bench.start("offline")
    found.log({"step": 1, "loss": float("nan")})
    found.summary({"a": 1})
    found.finish(30, exit_code=5)
    kinds = [entry[0] for entry in bench.seen()]
    assert kinds == ["init", "log", "summary", "finish"]
    assert bench.seen()[-1] == ["finish", 5]
    options = bench.seen()[0][2]
    assert isinstance(options, dict) and options["config"] == {"model": {"layers": 16}}
    assert bench.warnings == [] and found.dropped == 0


def test_a_resumed_run_continues_the_same_mirror(
    bench: Bench, client: Callable[[str], None]
) -> None:
    client("")
    for _ in range(2):
        bench.start("offline").finish(30)
    ids = [entry[2]["id"] for entry in bench.seen() if entry[0] == "init"]  # type: ignore[index]
    assert len(ids) == 2 and len(set(ids)) == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("def init(mode, **o): raise RuntimeError('no such entity')", "no such entity"),
        ("raise ImportError('broken install')", "broken install"),
        ("def init(mode, **o): os._exit(3)", "ended unexpectedly"),
        ("Run.log = lambda self, r: 1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_client_that_fails_costs_the_mirror_only(
    bench: Bench, client: Callable[[str], None], fault: str, words: str
) -> None:
    client(fault)
    found = bench.start("offline")
    found.log({"step": 1})
    wait_for(lambda: found.state == "failed")
    found.log({"step": 2})
    found.finish(10)
    assert words in found.problem
    assert sum("lost" in text for text in bench.warnings) == 1, bench.warnings
    assert found.dropped == 1 and "1 records were dropped" in bench.warnings[-1]


def test_a_client_that_hangs_blocks_neither_steps_nor_the_end(
    bench: Bench, client: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "QUEUE_RECORDS", 8)
    client("def init(mode, **o):\n    note('hangs', os.getpid())\n    time.sleep(600)")
    found = bench.start("offline")
    wait_for(lambda: bool(bench.seen()))
    padding = "x" * 4096  # more than the pipe and the queue hold together
    slowest = 0.0
    for step in range(200):
        before = time.monotonic()
        found.log({"step": step, "padding": padding})
        slowest = max(slowest, time.monotonic() - before)
    before = time.monotonic()
    found.finish(1.0)
    # Both bounds are far below the 600 s of the hang and far above any scheduling noise.
    assert slowest < 5 and time.monotonic() - before < 20
    assert found.dropped > 100
    assert any("too slow" in text for text in bench.warnings)
    assert any("did not finish" in text for text in bench.warnings)
    pid = int(str(bench.seen()[0][1]))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_hung_client_does_not_keep_a_killed_run_alive(
    bench: Bench, client: Callable[[str], None]
) -> None:
    """An exception in the run, without finish(): the interpreter must still end."""
    client("def init(mode, **o):\n    note('hangs', os.getpid())\n    time.sleep(600)")
    script = (
        "import pathlib, time, os\n"
        "from moe_train.callbacks.wandb import Mirror\n"
        f"folder = pathlib.Path({str(bench.folder)!r})\n"
        "m = Mirror('offline', project='p', name='n', folder=folder / 'wandb', config={},\n"
        "           warn=print, log=folder / 'wandb.log')\n"
        "while not (folder / 'seen.jsonl').exists(): time.sleep(0.02)\n"
        "raise SystemExit(7)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{root}"},
        timeout=60,
    )
    assert done.returncode == 7
    os.kill(int(str(bench.seen()[0][1])), signal.SIGKILL)


def test_a_killed_process_is_reported(bench: Bench, client: Callable[[str], None]) -> None:
    client("def init(mode, **o):\n    note('init', os.getpid())\n    return Run()")
    found = bench.start("offline")
    wait_for(lambda: found.state == "offline")
    os.kill(int(str(bench.seen()[0][1])), signal.SIGKILL)
    wait_for(lambda: found.state == "failed")
    for step in range(5):
        found.log({"step": step})
    found.finish(5)
    assert "ended unexpectedly" in found.problem


def test_a_process_that_dies_at_the_end_is_reported(
    bench: Bench, client: Callable[[str], None]
) -> None:
    client("Run.finish = lambda self, exit_code: os._exit(3)")
    found = bench.start("offline")
    found.finish(30)
    assert found.state == "failed" and "ended unexpectedly" in bench.warnings[0]


def test_online_without_a_key_is_loud_and_asks_nobody(
    bench: Bench, client: Callable[[str], None]
) -> None:
    client("")
    found = bench.start("online")
    found.finish(30)
    assert "no key" in found.problem and "no key" in bench.warnings[0]
    assert [entry[1] for entry in bench.seen() if entry[0] == "init"] == ["offline"]


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
        found = bench.start(mode)
        found.log({"step": 1})
        found.finish(30)
    assert url in found.problem and "unreachable" in bench.warnings[0]
    assert "wandb sync" in found.problem
    assert [entry[1] for entry in bench.seen() if entry[0] == "init"] == ["offline"]
    assert ["log", {"step": 1}] in bench.seen()


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
        found = bench.start("online")
        found.finish(30)
    assert "permission denied" in bench.warnings[0] and found.state == "offline"


def test_a_reachable_server_is_used(
    bench: Bench, client: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    client("")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        found = bench.start("auto")
        found.finish(30)
    assert found.state == "online" and bench.warnings == []


def test_keys_are_found_where_wandb_keeps_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_key()
    path = bench.folder / "netrc"
    path.write_text("machine api.wandb.ai login user password secret\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_key()
