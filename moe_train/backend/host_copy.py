"""Small tensors on their way from a device to the host.

A plain ``.cpu()`` or ``.tolist()`` moves pageable memory and lets the host wait inside the copy.
Here it is one copy into pinned memory, queued like any other work, and an event that is waited
for. The CPU runs the same lines with memory that is not pinned.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray


def to_host(tensor: torch.Tensor) -> NDArray[Any]:
    """Values of ``tensor`` as an array of their own: one device-to-host copy."""
    device = tensor.device
    values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type != "cpu")
    values.copy_(tensor, non_blocking=True)
    copied = torch.get_device_module(device).Event()
    copied.record()
    copied.synchronize()
    array: NDArray[Any] = values.numpy()
    return array
