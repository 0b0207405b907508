"""Stand-ins for CUDA streams and events: host work is in order, so waiting is free."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class HostEvent:
    """An event that has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        """Remember the time, so that ``elapsed_time`` means something."""
        self._at = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds between two records."""
        return (end._at - self._at) * 1e3


class HostStream:
    """A queue that runs everything at once, in the order of the program."""

    device_index = 0
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority, as CUDA reports them."""
        return 0, 0

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """Record and return an event."""
        event = event or HostEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always idle."""
        return True


DEFAULT_STREAM = HostStream()


def current_stream(device: Any = None) -> HostStream:
    """The one stream of the host."""
    return DEFAULT_STREAM


@contextlib.contextmanager
def stream_context(stream: Any) -> Iterator[None]:
    """Run the block at once, whatever the stream."""
    yield
