"""Out-of-memory errors of torch, CUDA, NCCL and the host, recognized through wrapping errors."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

import torch

from moe_train.errors import DeviceMemoryError, HostMemoryError, MemoryFault, MoeTrainError

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "EiB": 2**60}
_SIZE = r"([\d.]+) (bytes|[KMGTE]iB)"
# Parts of torch.OutOfMemoryError's message (c10/cuda/CUDACachingAllocator.cpp).
_REQUESTED = re.compile(rf"Tried to allocate {_SIZE}")
_TOTAL = re.compile(rf"total capacity of {_SIZE}")
_FREE = re.compile(rf"of which {_SIZE} is free")
_HELD = re.compile(rf"this process has {_SIZE} memory in use")
_ALLOCATED = re.compile(rf"Of the allocated memory {_SIZE} is allocated by PyTorch")
_UNUSED = re.compile(rf"{_SIZE} is reserved by PyTorch but unallocated")
# Messages of CUDA, its libraries and NCCL.
_DEVICE = re.compile(
    r"CUDA (driver )?(error: )?out of memory|Triton Error \[CUDA\]: out of memory"
    r"|_ALLOC(ATION)?_FAILED|cudaErrorMemoryAllocation"
    r"|Cuda failure \d* ?'out of memory'|Failed to CUDA calloc",
    re.IGNORECASE,
)
_HOST = re.compile(r"DefaultCPUAllocator: (?:can't allocate|not enough) memory")
_HOST_REQUESTED = re.compile(r"tried to allocate (\d+) bytes")

DEVICE_FIX = "a smaller batch.micro, recompute=all, or more ranks"
HOST_FIX = (
    "fewer ranks on a node, checkpoint.asynchronous=false, or a machine with more memory; "
    "the rank's log has the place"
)


def memory_fault(error: BaseException, doing: str = "") -> MemoryFault | None:
    """The MemoryFault for an out-of-memory error at the root of ``error``; None without one.

    Args:
        error: also one that was raised ``from`` the first, or torch's exception of several ranks.
        doing: the operation that failed, for the message.
    """
    for one in _roots(error):
        if isinstance(one, MemoryFault):
            return one
        if isinstance(one, MoeTrainError):
            continue
        text = str(one)
        where = f"rank {os.environ.get('RANK', '0')}"
        during = f" ({doing})" if doing else ""
        if isinstance(one, MemoryError) or (
            (isinstance(one, RuntimeError) and _HOST.search(text))
            or (isinstance(one, OSError) and one.errno == errno.ENOMEM)
        ):
            return HostMemoryError(where, f"out of host memory{during}: {_host(text)}", HOST_FIX)
        if isinstance(one, torch.OutOfMemoryError) or (
            isinstance(one, RuntimeError) and _DEVICE.search(text)
        ):
            problem = f"out of device memory{during}: {_device(text)}"
            return DeviceMemoryError(where, problem, DEVICE_FIX)
    return None


def _roots(error: BaseException) -> Iterator[BaseException]:
    """``error``, what it was raised from, and the parts of an exception of several ranks."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        pending.append(one.__cause__)
        failures = getattr(one, "failures", None)
        if isinstance(failures, dict):
            pending += [part[0] for part in failures.values() if isinstance(part, tuple)]


def _bytes(pattern: re.Pattern[str], text: str) -> str | None:
    """A size in GB, as the plan has them."""
    match = pattern.search(text)
    if match is None:
        return None
    size = float(match[1]) * _UNITS[match[2]]
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.3g} MB"


def _device(text: str) -> str:
    requested = _bytes(_REQUESTED, text)
    if requested is None:
        return text.splitlines()[0] if text else "no size given"
    message = f"requested {requested}"
    free, total = _bytes(_FREE, text), _bytes(_TOTAL, text)
    if free and total:
        message += f" where {free} of {total} were free"
    allocated, unused, held = (_bytes(one, text) for one in (_ALLOCATED, _UNUSED, _HELD))
    parts = [
        f"{size} {what}"
        for size, what in (
            (held, "held by this process"),
            (allocated, "of tensors"),
            (unused, "reserved and unused"),
        )
        if size
    ]
    return message + (f" ({', '.join(parts)})" if parts else "")


def _host(text: str) -> str:
    match = _HOST_REQUESTED.search(text)
    if match:
        return f"requested {int(match[1]) / 1e9:.2f} GB"
    return text.splitlines()[0] if text else "no size given"
