"""Termination signals: a handler sets a flag, which all ranks exchange after every step.

`moe_train.train.loop.sync_control_flags` exchanges it; the loop then saves and stops.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Sent by schedulers, keyboards and closed terminals, and forwarded by torchrun."""
_PR_SET_PDEATHSIG = 1
"""prctl(2)."""


class SignalHandler:
    """Context that records the first termination signal; later ones change nothing.

    Meant for the whole life of a process. After a first signal the process ignores further ones
    until it has ended: launchers send a second signal to ranks that still write their status.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            # nohup and shells with background jobs had theirs ignored on purpose; USR1 only until
            # a handler exists (launch/slurm_node.sh).
            if number == signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # Ignored signals stay ignored through the interpreter's own exit; handlers do not.
            after = handler if self.received is None else signal.SIG_IGN
            signal.signal(number, after)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number


def terminate_with_launcher() -> None:
    """Request SIGTERM for this process when torchrun dies; without torchrun, do nothing.

    A killed launcher does not end its ranks: they would train on, keep the run folder locked, and
    rendezvous with the ranks that replace them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
