"""Worker processes, seen from the command: start a task, wait for it no longer than allowed."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_train.gpu_check.findings import Failed, Skip

ROOT = Path(__file__).resolve().parents[2]
TAIL = 3000
"""Characters of a process's output that a report quotes."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: this checkout importable from anywhere, one thread a rank."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    mine = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **mine, "PYTHONUNBUFFERED": "1", **extra}


def end_with_parent() -> None:
    """In a child before its program starts: be killed when the command is (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a child that leads its own process group, and everything that it has started."""
    # torchrun gives every rank a session of its own.
    below = _descendants(process.pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in below:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    """Processes below ``pid``; none where psutil is not installed."""
    try:
        import psutil
    except ImportError:
        return []
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def tail(path: Path, start: int = 0) -> str:
    """The end of what was written to ``path`` after offset ``start``."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(start, size - TAIL))
            return stream.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""


class Worker:
    """A process that runs tasks one after the other; started when first used, and again when lost.

    Args:
        name: of its log file.
        log: what it prints goes there.
        extra: more of its environment.
    """

    def __init__(self, name: str, log: Path, extra: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        self._extra = dict(extra)
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes | None] = queue.Queue()
        self._task = ""
        self._offset = 0

    def call(self, task: str, seconds: float, /, **args: Any) -> Any:
        """Run a task and return its answer.

        Raises:
            Failed: it raised, its process ended, or ``seconds`` were not enough.
            Skip: the task found that it has nothing to do on this machine.
        """
        self.begin(task, **args)
        return self.finish(seconds)

    def begin(self, task: str, /, **args: Any) -> None:
        """Start a task; :meth:`finish` has its answer."""
        process = self._alive()
        self._task, self._offset = task, self.log.stat().st_size
        line = json.dumps({"task": task, "args": args}) + "\n"
        assert process.stdin is not None
        # finish() reports a process that is gone.
        with contextlib.suppress(OSError):
            process.stdin.write(line.encode())
            process.stdin.flush()

    def finish(self, seconds: float) -> Any:
        """Wait for the task that was begun; raises as :meth:`call`."""
        try:
            line = self._answers.get(timeout=max(0.1, seconds))
        except queue.Empty:
            self.stop()
            raise Failed(
                f"{self._task} did not end in the {seconds:.0f} s left to it\n{self._said()}"
            ) from None
        if line is None:
            code = self._process.wait() if self._process else "unknown"
            self.stop()
            raise Failed(f"the process of {self._task} ended with code {code}\n{self._said()}")
        answer = json.loads(line)
        if "skip" in answer:
            raise Skip(answer["skip"])
        if "error" in answer:
            raise Failed(f"{answer['error']}\n{answer['trace']}")
        return answer["value"]

    def output_tail(self) -> str:
        """The end of what the last task printed."""
        return tail(self.log, self._offset)

    def stop(self) -> None:
        """Kill the process; the next task starts a fresh one."""
        process, self._process = self._process, None
        if process is not None:
            kill_group(process)

    def _said(self) -> str:
        return f"its last output:\n{self.output_tail()}"

    def _alive(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "moe_train.gpu_check.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(self._extra),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self._process, self._answers = process, queue.Queue()
        threading.Thread(target=_listen, args=(process, self._answers), daemon=True).start()
        return process


def _listen(process: subprocess.Popen[bytes], answers: queue.Queue[bytes | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put(None)
