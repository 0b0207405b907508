"""Requests to stop: a signal sets a flag, and all ranks agree on it at a step's edge."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""What schedulers, keyboards and closed terminals send, and torchrun hands on."""


class Interrupt:
    """Context that turns termination signals into a flag; a second signal changes nothing.

    Meant for all that a process does, its last words included: once it was asked to stop, it is
    on its way out and hears no further request, since launchers send a second one to whoever is
    still busy writing why it ends.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            # nohup and shells with background jobs had theirs ignored on purpose; USR1 only until
            # somebody listens (launch/slurm_node.sh).
            if number == signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # Ignored signals stay so through the interpreter's own end; handlers do not.
            after = handler if self.signal is None else signal.SIG_IGN
            signal.signal(number, after)  # type: ignore[arg-type]

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number


def end_with_launcher() -> None:
    """Have this process told to stop when torchrun is gone; nothing where there is none.

    A launcher that is killed takes nobody along: its ranks would go on, hold the run folder, and
    meet the ranks that replace them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


_PR_SET_PDEATHSIG = 1
"""prctl(2)."""
