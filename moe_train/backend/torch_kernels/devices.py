"""Differences between CPU and GPU in these kernels: one table of devices.

Nothing else in this package looks at a tensor's device. docs/kernels.md has the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

GROUPED_CPU = (2, 13)
"""First torch whose ``_grouped_mm`` is used on a CPU; a loop gives the same numbers below it."""
GROUPED_MAJORS = (9, 10)
"""Major compute capabilities with a kernel for ``_grouped_mm`` (CUTLASS, torch 2.9 to 2.15).

Elsewhere torch itself loops over the groups, and copies the offsets to the host for that.
"""


@dataclass(frozen=True)
class Device:
    """How one kind of device is used, with the reason."""

    kind: str
    """``torch.device.type``."""
    grouped: Callable[[torch.Tensor], bool]
    """Whether the expert products of such operands go to ``torch._grouped_mm``, or are looped."""
    grouped_why: str
    offsets: Callable[[Sequence[int], torch.device], torch.Tensor]
    """An int32 tensor of host integers on the device, without waiting for it."""
    offsets_why: str


def _cpu_grouped(operand: torch.Tensor) -> bool:
    return _torch_version() >= GROUPED_CPU


def _cuda_grouped(operand: torch.Tensor) -> bool:
    return operand.dtype == torch.bfloat16 and _major(operand.device.index or 0) in GROUPED_MAJORS


@cache
def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


@cache
def _major(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def _plain(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _pinned(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    # A copy from pageable memory waits for the stream; the pinned block is kept by torch's
    # host allocator until the copy has been made.
    pinned = torch.tensor(numbers, dtype=torch.int32, pin_memory=True)
    return pinned.to(device, non_blocking=True)


DEVICES = {
    device.kind: device
    for device in (
        Device(
            kind="cpu",
            grouped=_cpu_grouped,
            grouped_why=f"from torch {GROUPED_CPU[0]}.{GROUPED_CPU[1]}, one call for all experts",
            offsets=_plain,
            offsets_why="made where they are used",
        ),
        Device(
            kind="cuda",
            grouped=_cuda_grouped,
            grouped_why="bf16 on compute capability 9 and 10 has a kernel; anything else torch "
            "would loop over, with a copy of the offsets to the host",
            offsets=_pinned,
            offsets_why="copied from pinned memory, so that the host need not wait",
        ),
    )
}


def weight_device(config: TransformerConfig) -> torch.device | int | None:
    """Where Megatron's own layers allocate their weights; None is torch's default."""
    return None if config.use_cpu_initialization else torch.cuda.current_device()


def device_of(tensor: torch.Tensor) -> Device:
    """The row of the table for ``tensor``'s device."""
    return DEVICES[tensor.device.type]
