"""Shutdown budget: whether a checkpoint can finish within the launcher's SIGTERM grace period."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LAUNCHED = "TORCHELASTIC_RUN_ID"
TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
DEFAULT = 30.0
"""torchrun's seconds between SIGTERM and SIGKILL, unless TIMEOUT is set."""


def grace_seconds() -> float:
    """Seconds that this process has from SIGTERM to SIGKILL; infinite without torchrun."""
    if LAUNCHED not in os.environ:
        return float("inf")
    return float(os.environ.get(TIMEOUT) or DEFAULT)


class ShutdownBudget:
    """Measures what may lie between a stop signal and the end of the save that follows it.

    Args:
        seconds: the grace period.
        warn: called once, with a message, when the grace period is too short.
    """

    def __init__(self, seconds: float, warn: Callable[[str], None]) -> None:
        self._seconds, self._warn = seconds, warn
        self._latest: dict[str, float] = {}
        self._warned = False

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Measure ``part``, after which a stop signal is acted on."""
        begun = time.monotonic()
        yield
        self._latest[part] = time.monotonic() - begun

    def check(self, save_seconds: float) -> None:
        """Warn if a checkpoint cannot finish within the SIGTERM grace period.

        The longest part counts, since the signal may arrive at its start; only the latest time of
        each part, since the first step is slower than the others.
        """
        name, before = max(self._latest.items(), key=lambda item: item[1], default=("", 0.0))
        total = before + save_seconds
        if self._warned or total <= self._seconds:
            return
        self._warned = True
        self._warn(
            f"a checkpoint cannot finish within the {self._seconds:.0f} s that the "
            f"launcher allows after SIGTERM: it may take {total:.1f} s ({name} {before:.1f} s, "
            f"then the checkpoint {save_seconds:.1f} s), and steps since the last checkpoint would "
            f"be lost. Raise {TIMEOUT}, and let the scheduler send its signal earlier"
        )
