"""Whether a run that is told to stop can save in time, said before it is told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LAUNCHED = "TORCHELASTIC_RUN_ID"
TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
DEFAULT = 30.0
"""torchrun's time between SIGTERM and SIGKILL, where TIMEOUT does not say otherwise."""


def grace_seconds() -> float:
    """Seconds that this process has from SIGTERM to its end; infinite without torchrun."""
    if LAUNCHED not in os.environ:
        return float("inf")
    return float(os.environ.get(TIMEOUT) or DEFAULT)


class Grace:
    """Times what may lie between a signal and the end of the save that it asks for.

    Args:
        seconds: what the launcher leaves.
        warn: called once, with words, when it would not be enough.
    """

    def __init__(self, seconds: float, warn: Callable[[str], None]) -> None:
        self._seconds, self._warn = seconds, warn
        self._latest: dict[str, float] = {}
        self._told = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time something at whose edges signals are heard."""
        begun = time.monotonic()
        yield
        self._latest[name] = time.monotonic() - begun

    def hold(self, save: float) -> None:
        """Hold a save that took ``save`` seconds, and what may come before it, against the grace.

        A signal is heard at the edge of a part, so the longest may come before the save. The
        latest times count: a first step is not like the others.
        """
        name, before = max(self._latest.items(), key=lambda item: item[1], default=("", 0.0))
        if self._told or before + save <= self._seconds:
            return
        self._told = True
        self._warn(
            f"warning: a stop may take {before + save:.1f} s here ({name} {before:.1f} s, then the "
            f"checkpoint {save:.1f} s), and the launcher kills its ranks {self._seconds:.0f} s "
            f"after SIGTERM: what follows the last checkpoint would be lost. Set {TIMEOUT} higher, "
            "and let the scheduler's signal come earlier"
        )
