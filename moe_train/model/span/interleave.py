"""Interleaves the two slots of a tick: one computes while the other's all-to-all is under way.

Only one of the two threads runs at any time, and control passes to the other only where a slot has
started an all-to-all. Every rank of a replica passes the same points in the same order, so all of
them issue their collectives in one order, as they do without interleaving.

The second slot has one thread for the whole life of the schedule, so that what libraries keep by
thread (device context, handles, workspaces) is created once. It selects the rank's device before
anything else, and runs each slot with the stream, gradient mode and autocast of the first slot's
thread.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

import torch

from moe_train.backend.device import ThreadState, select_device


class OtherSlotFailed(Exception):
    """The other slot failed, so this one cannot go on. Never the failure that is reported."""


class Handoff:
    """Runs pairs of slots, 0 and 1, in two threads that pass control to each other.

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
                target=_serve, args=(self._device, self._work), name="second slot", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._work.put, None)
        self._turn, self._over, self._failures = 0, [False, False], []
        state, done = ThreadState.here(self._device), threading.Event()

        def other() -> None:
            try:
                self._slot(1, second, state)
            finally:
                done.set()

        self._work.put(other)
        self._slot(0, first)
        done.wait()
        if self._failures:
            raise self._failures[0]

    def switch(self, slot: int) -> None:
        """Called by ``slot``: let the other one run until it switches back or ends.

        Raises:
            OtherSlotFailed: the other slot failed.
        """
        with self._change:
            if not self._over[1 - slot]:
                self._turn = 1 - slot
                self._change.notify()
                self._change.wait_for(lambda: self._turn == slot)
            if self._failures:
                raise OtherSlotFailed

    def _slot(self, slot: int, work: Callable[[], None], state: ThreadState | None = None) -> None:
        with self._change:
            self._change.wait_for(lambda: self._turn == slot)
        try:
            if not self._failures:
                with state.entered() if state else contextlib.nullcontext():
                    work()
        except BaseException as failure:  # noqa: BLE001  run() raises it where it belongs
            self._failures.append(failure)
        finally:
            with self._change:
                self._over[slot] = True
                self._turn = 1 - slot
                self._change.notify()


def _serve(device: torch.device, work: SimpleQueue[Callable[[], None] | None]) -> None:
    """Main function of the second slot's thread."""
    select_device(device)
    while (slot := work.get()) is not None:
        slot()
        # A slot refers to a flush, and that to activations: hold none while waiting for the next.
        del slot
