"""Two halves of a tick that take turns: one computes while the other's exchange is under way.

Only one of the two threads runs at any time, and they change places only where a half has started
an all-to-all. Every rank of a replica passes the same places in the same order, so all of them
issue all their collectives in one order, as they do without turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Abandoned(Exception):
    """The other half failed; this one cannot go on."""


class Turns:
    """One pair of halves; 0 begins."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._turn = 0
        self._over = [False, False]
        self._failures: list[BaseException] = []

    def run(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """Run both to their end, ``first`` in this thread.

        Raises:
            BaseException: the first failure of either.
        """
        other = threading.Thread(target=self._half, args=(1, second), name="second half")
        other.start()
        self._half(0, first)
        other.join()
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

    def _half(self, half: int, work: Callable[[], None]) -> None:
        with self._change:
            self._change.wait_for(lambda: self._turn == half)
        try:
            if not self._failures:
                work()
        except BaseException as failure:  # noqa: BLE001  run() raises it where it belongs
            self._failures.append(failure)
        finally:
            with self._change:
                self._over[half] = True
                self._turn = 1 - half
                self._change.notify()
