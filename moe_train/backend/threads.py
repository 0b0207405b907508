"""What a thread has to itself: current device, stream, gradient mode and autocast.

A new thread starts with device 0, the default stream, gradients on and autocast off, whatever the
thread that made it had. On a machine with several devices its work would run on the wrong one:
``batch_isend_irecv`` and kernels that are launched by the current device follow it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


def select_device(device: torch.device) -> None:
    """Make ``device`` the current one of this thread."""
    torch.get_device_module(device).set_device(device)


@dataclass(frozen=True)
class ThreadState:
    """The calling thread's state, to be entered by another."""

    device: torch.device
    stream: Any
    gradients: bool
    autocast: bool
    autocast_dtype: torch.dtype

    @classmethod
    def here(cls, device: torch.device) -> ThreadState:
        """State of the calling thread, which computes on ``device``."""
        return cls(
            device,
            torch.get_device_module(device).current_stream(device),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
        )

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have this state inside the block."""
        select_device(self.device)
        with (
            torch.get_device_module(self.device).stream(self.stream),
            torch.set_grad_enabled(self.gradients),
            torch.autocast(self.device.type, enabled=self.autocast, dtype=self.autocast_dtype),
        ):
            yield
