"""A thread beside the loop that ends a rank which makes no progress, and says who is to blame.

Every rank's watchdog notes its phase in ``logs/rank_K.beat`` while its process runs. When a phase
takes longer than the limit, the rank writes all its stacks to ``logs/rank_K.stacks`` and looks at
the others' notes: a rank whose note is old has stopped or died, otherwise the one that is behind
in its phases is the one that the others wait for.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

PATIENCE = 10.0
"""Seconds that a rank has to end by itself after another one did."""
LIVELY = 4
"""Notes older than so many periods come from a process that does not run."""


class Watchdog:
    """Context: watches this rank's phases until it ends.

    Args:
        logs: folder that all ranks share.
        limit: seconds that a phase may take; 0 watches nothing.
        on_hang: called once, from the watchdog's thread, with what is wrong.
        ended: what another rank said about why it ends, or None. A rank that waits for it in a
            collective of NCCL is not told by anybody else.
    """

    def __init__(
        self,
        logs: Path,
        rank: int,
        world: int,
        limit: float,
        on_hang: Callable[[str], None],
        ended: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._logs, self.rank, self.world = logs, rank, world
        self._limit, self._on_hang, self._ended = limit, on_hang, ended
        self._period = min(2.0, max(limit / 8, 0.05))
        self._phase, self._step, self._count, self._since = "start", 0, 0, time.monotonic()
        self._stop = threading.Event()
        self._watched = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._limit:
            self._note()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._limit:
            self._thread.join()
            self._beat(self.rank).unlink(missing_ok=True)

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
        noticed = 0.0
        while not self._stop.wait(self._period):
            self._note()
            # A rank that can end by itself does so at once, and stops this thread.
            if (cause := self._ended()) is not None:
                noticed = noticed or time.monotonic()
                if time.monotonic() - noticed > PATIENCE:
                    self._on_hang(f"waited for a rank that has ended: {cause}")
                    return
            if time.monotonic() - self._since > self._limit:
                self._on_hang(self._verdict())
                return

    def _verdict(self) -> str:
        stuck = time.monotonic() - self._since
        where = waiting_in(sys._current_frames().get(self._watched or 0))
        with open(self._logs / f"rank_{self.rank}.stacks", "w", encoding="utf-8") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        return (
            f"step {self._step}, {self._phase}: no progress for {stuck:.0f} s, waiting in "
            f"{where}; {self._culprit()}"
        )

    def _culprit(self) -> str:
        notes: dict[int, dict[str, Any]] = {}
        silent = []
        for rank in range(self.world):
            try:
                text = self._beat(rank).read_text(encoding="utf-8")
                age = time.time() - self._beat(rank).stat().st_mtime
            except OSError:
                silent.append(f"rank {rank} has left no note")
                continue
            notes[rank] = json.loads(text)
            if age > LIVELY * self._period + 1:
                said = notes[rank]
                silent.append(
                    f"rank {rank} gives no sign for {age:.0f} s (stopped or dead), last at "
                    f"step {said['step']}, {said['phase']}"
                )
        if silent:
            return "; ".join(silent)
        behind = min(note["count"] for note in notes.values())
        late = [rank for rank, note in notes.items() if note["count"] == behind]
        if len(late) == len(notes):
            return "all ranks are alive and in the same phase"
        return f"rank {late[0]} is behind, at step {notes[late[0]]['step']}, " + str(
            notes[late[0]]["phase"]
        )

    def _note(self) -> None:
        note = {"step": self._step, "phase": self._phase, "count": self._count}
        path = self._beat(self.rank)
        fresh = path.with_suffix(".beat.new")
        fresh.write_text(json.dumps(note), encoding="utf-8")
        fresh.replace(path)

    def _beat(self, rank: int) -> Path:
        return self._logs / f"rank_{rank}.beat"


def waiting_in(frame: FrameType | None) -> str:
    """The collective, or else the innermost function, that a stack is in."""
    inner = frame.f_code.co_qualname if frame is not None else "an unknown place"
    while frame is not None:
        if frame.f_code.co_filename.endswith("distributed_c10d.py"):
            found = frame.f_code.co_qualname
            if not found.startswith("_"):
                inner = found
        frame = frame.f_back
    return inner.replace("_exception_logger.<locals>.wrapper", "a collective")
