"""Two halves of a tick that take turns: one computes while the other's exchange is under way.

Only one of the two threads runs at any time, and they change places only where a half has started
an all-to-all. Every rank of a replica passes the same places in the same order, so all of them
issue all their collectives in one order, as they do without turns.

The second half has one thread for the whole life of the schedule: what libraries keep by thread
(device context, handles, workspaces) is made once. It selects the rank's device before anything
else, and runs each half with the stream, gradient mode and autocast of the first half's thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

import torch

from moe_train.backend.threads import ThreadState, select_device


class Abandoned(Exception):
    """The other half failed; this one cannot go on. Never the failure that is reported."""


class Turns:
    """Pairs of halves, one after the other; of each pair 0 begins.

    Args:
        device: the rank's, on which both threads compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._change = threading.Condition()
        self._turn = 0
        self._over = [False, False]
        self._failures: list[BaseException] = []
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """Run both to their end, ``first`` in this thread.

        Raises:
            BaseException: the first failure of either, as it was raised.
        """
        if self._thread is None:
            # It ends with this object, or as a daemon with the process.
            self._thread = threading.Thread(
                target=_serve, args=(self._device, self._work), name="second half", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._work.put, None)
        self._turn, self._over, self._failures = 0, [False, False], []
        state, done = ThreadState.here(self._device), threading.Event()

        def other() -> None:
            try:
                self._half(1, second, state)
            finally:
                done.set()

        self._work.put(other)
        self._half(0, first)
        done.wait()
        if self._failures:
            raise self._failures[0]

    def give(self, half: int) -> None:
        """Let the other half run until it gives its turn back or ends.

        Raises:
            Abandoned: the other half failed.
        """
        with self._change:
            if not self._over[1 - half]:
                self._turn = 1 - half
                self._change.notify()
                self._change.wait_for(lambda: self._turn == half)
            if self._failures:
                raise Abandoned

    def _half(self, half: int, work: Callable[[], None], state: ThreadState | None = None) -> None:
        with self._change:
            self._change.wait_for(lambda: self._turn == half)
        try:
            if not self._failures:
                if state is None:
                    work()
                else:
                    with state.entered():
                        work()
        except BaseException as failure:  # noqa: BLE001  run() raises it where it belongs
            self._failures.append(failure)
        finally:
            with self._change:
                self._over[half] = True
                self._turn = 1 - half
                self._change.notify()


def _serve(device: torch.device, work: SimpleQueue[Callable[[], None] | None]) -> None:
    """The second half's thread."""
    select_device(device)
    while (half := work.get()) is not None:
        half()
        # A half holds a flush, and the flush activations: keep none while waiting for the next.
        del half
