"""Watchdog: a thread that ends a rank whose training makes no progress, and names the cause.

Every rank's watchdog writes its current phase to ``logs/rank_K.beat`` (the heartbeat). When a phase
exceeds the time limit, the rank dumps all its stacks to ``logs/rank_K.stacks`` and reads the other
heartbeats: a stale one belongs to a stopped or dead process; otherwise the rank with the fewest
completed phases is the one that the others wait for.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

from moe_train.errors import EXIT_HUNG

HEARTBEAT_SECONDS = 10.0
"""Longest time between two heartbeats; the run folder may be on a shared file system."""
STALE_HEARTBEATS = 4
"""A heartbeat that missed so many intervals comes from a process that does not run."""
PEER_EXIT_SECONDS = 10.0
"""How long a rank may take to end by itself after another rank reported a failure."""
HANG_REPORT_SECONDS = 30.0
"""How long a hung rank may take to write its stacks, its error and the run's status."""
_LINE = 120
"""Bytes of a heartbeat file: overwritten in place, so a reader never finds it empty."""


class Watchdog:
    """Context: limits the time of this rank's phases.

    Args:
        logs: folder that all ranks share.
        limit: seconds that a phase may take; 0 disables the watchdog.
        on_hang: called once, from the watchdog's thread, with what is wrong; ends the process
            (`moe_train.run.failure.exit_hung`).
        peer_failure: the failure that another rank reported, or None. A rank that waits for that
            one in an NCCL collective gets no error by itself.
    """

    def __init__(
        self,
        logs: Path,
        rank: int,
        world: int,
        limit: float,
        on_hang: Callable[[str], None],
        peer_failure: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._logs, self.rank, self.world = logs, rank, world
        self._limit, self._on_hang, self._peer_failure = limit, on_hang, peer_failure
        self._interval = min(HEARTBEAT_SECONDS, max(limit / 8, 0.05))
        self._phase, self._step, self._count, self._since = "start", 0, 0, time.monotonic()
        self._stop = threading.Event()
        self._watched = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._limit:
            self._write_heartbeat()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._limit:
            self._thread.join()
            self._heartbeat(self.rank).unlink(missing_ok=True)

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Everything inside belongs to one phase, whose time is limited."""
        before = self._phase
        self._enter(name, step)
        try:
            yield
        finally:
            self._enter(before, step)

    def _enter(self, name: str, step: int) -> None:
        self._phase, self._step = name, step
        self._count += 1
        self._since = time.monotonic()

    def _watch(self) -> None:
        failed = 0.0
        written = time.monotonic()
        while not self._stop.wait(min(2.0, self._interval)):
            now = time.monotonic()
            if now - written >= self._interval:
                self._write_heartbeat()
                written = now
            # A rank that can end by itself does so at once, and stops this thread.
            if (failure := self._peer_failure()) is not None:
                failed = failed or now
                if now - failed > PEER_EXIT_SECONDS:
                    self._end(lambda: f"waited for a rank that has failed: {failure}")
                    return
            if (seconds := now - self._since) > self._limit:
                self._end(lambda: self._diagnose(seconds))
                return

    def _end(self, diagnose: Callable[[], str]) -> None:
        # The run folder may be what the main thread waits for: writing there may never return.
        timer = exit_after(HANG_REPORT_SECONDS)
        self._on_hang(diagnose())
        timer.cancel()

    def _diagnose(self, seconds: float) -> str:
        function = waiting_in(sys._current_frames().get(self._watched or 0))
        with open(self._logs / f"rank_{self.rank}.stacks", "w", encoding="utf-8") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        return (
            f"step {self._step}, {self._phase}: no progress for {seconds:.0f} s, waiting in "
            f"{function}; {self._compare_heartbeats()}"
        )

    def _compare_heartbeats(self) -> str:
        # Its time stamp is the file server's clock, which need not be this machine's.
        self._write_heartbeat()
        now = self._heartbeat(self.rank).stat().st_mtime
        beats: dict[int, dict[str, Any]] = {}
        dead = []
        for rank in range(self.world):
            try:
                with open(self._heartbeat(rank), encoding="utf-8") as stream:
                    age = now - os.fstat(stream.fileno()).st_mtime
                    beats[rank] = json.load(stream)
            except OSError:
                dead.append(f"rank {rank} has no heartbeat file")
                continue
            if age > STALE_HEARTBEATS * self._interval + 1:
                dead.append(
                    f"rank {rank}: heartbeat stale for {age:.0f} s (process stopped or dead), last "
                    f"at step {beats[rank]['step']}, {beats[rank]['phase']}"
                )
        if dead:
            return "; ".join(dead)
        fewest = min(beat["count"] for beat in beats.values())
        behind = [rank for rank, beat in beats.items() if beat["count"] == fewest]
        if len(behind) == len(beats):
            return "all ranks are alive and in the same phase"
        beat = beats[behind[0]]
        return f"rank {behind[0]} is behind, at step {beat['step']}, {beat['phase']}"

    def _write_heartbeat(self) -> None:
        beat = {"step": self._step, "phase": self._phase, "count": self._count}
        # Opened each time: closing is what makes a write visible to other clients of NFS.
        file = os.open(self._heartbeat(self.rank), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, json.dumps(beat).ljust(_LINE).encode(), 0)
        finally:
            os.close(file)

    def _heartbeat(self, rank: int) -> Path:
        return self._logs / f"rank_{rank}.beat"


def exit_after(seconds: float) -> threading.Timer:
    """Start a daemon thread that ends this process with EXIT_HUNG, unless it is cancelled."""
    timer = threading.Timer(seconds, os._exit, [EXIT_HUNG])
    timer.daemon = True
    timer.start()
    return timer


def waiting_in(frame: FrameType | None) -> str:
    """The collective, or else the innermost function, that a stack is in."""
    inner = frame.f_code.co_qualname if frame is not None else "an unknown function"
    while frame is not None:
        if frame.f_code.co_filename.endswith("distributed_c10d.py"):
            result = frame.f_code.co_qualname
            if not result.startswith("_"):
                inner = result
        frame = frame.f_back
    return inner.replace("_exception_logger.<locals>.wrapper", "a collective")
