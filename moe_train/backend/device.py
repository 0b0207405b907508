"""Per-thread device state of torch, and copies from a device to host memory.

A new thread starts with device 0, the default stream, gradients on and autocast off, whatever the
thread that started it had. On a machine with several devices its work would run on the wrong one:
``batch_isend_irecv`` and kernels that are launched by the current device follow it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray


def select_device(device: torch.device) -> None:
    """Make ``device`` the current one of this thread."""
    torch.get_device_module(device).set_device(device)


@dataclass(frozen=True)
class ThreadState:
    """Device, stream, gradient mode and autocast of one thread, for use in another."""

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
        """Apply this state to the calling thread inside the block."""
        select_device(self.device)
        with (
            torch.get_device_module(self.device).stream(self.stream),
            torch.set_grad_enabled(self.gradients),
            torch.autocast(self.device.type, enabled=self.autocast, dtype=self.autocast_dtype),
        ):
            yield


def to_host(tensor: torch.Tensor) -> NDArray[Any]:
    """Values of ``tensor`` in host memory: one copy, of the same shape and dtype.

    A plain ``.cpu()`` or ``.tolist()`` copies to pageable memory and blocks the host inside the
    copy. Here the copy goes to pinned memory, queued like any other work, and an event is waited
    for. On a CPU the same lines run with memory that is not pinned.
    """
    device = tensor.device
    values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type != "cpu")
    values.copy_(tensor, non_blocking=True)
    copied = torch.get_device_module(device).Event()
    copied.record()
    copied.synchronize()
    array: NDArray[Any] = values.numpy()
    return array
