"""A profile of one step of the open session: kernels, device idle time, host synchronisations."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from moe_train.gpu_check.tasks.session import take_step

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
         "hipStreamSynchronize", "hipDeviceSynchronize")  # fmt: skip
"""Runtime calls in which the host waits for the device."""
READS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
"""Operators whose result the host waits for."""


def profile(top: int = 15) -> dict[str, Any]:
    """Profile one step; every part is left out, with its reason, where it cannot be had."""
    take_step()
    result: dict[str, Any] = {}
    for part in (_profiled, _synchronising):
        try:
            result |= part(top)
        # A profiler that is not there or is busy costs its own figures alone.
        except Exception as error:  # noqa: BLE001
            result[f"{part.__name__.lstrip('_')}_error"] = f"{type(error).__name__}: {error}"[:300]
    return result


def _profiled(top: int) -> dict[str, Any]:
    kinds = [ProfilerActivity.CPU]
    on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_device:
        kinds.append(ProfilerActivity.CUDA)
    begun = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as profiler:
        take_step()
    wall = time.perf_counter() - begun
    events = list(profiler.events() or [])
    return {"profiled_seconds": wall, **summary(events, on_device, top)}


def summary(events: list[Any], on_device: bool, top: int) -> dict[str, Any]:
    """Counts and times of torch.profiler's events (times there are microseconds).

    Args:
        events: ``FunctionEvent``s of one step.
        on_device: whether device events are among them; else operators are ranked.
    """
    counts = Counter(event.name for event in events)
    device = [event for event in events if _is_device(event)]
    copies = Counter(event.name for event in device if event.name.startswith("Memcpy"))
    kernels = [event for event in device if not event.name.startswith(("Memcpy", "Memset"))]
    result: dict[str, Any] = {
        "host_waits": {name: counts[name] for name in WAITS if counts[name]},
        "host_reads": {name: counts[name] for name in READS if counts[name]},
        "copies_to_host": sum(count for name, count in copies.items() if "DtoH" in name),
        "copies": dict(copies),
    }
    ranked = device if on_device else [event for event in events if event.name.startswith("aten::")]
    if on_device and device:
        spans = [(event.time_range.start, event.time_range.end) for event in device]
        busy, window = union(spans), max(b for _, b in spans) - min(a for a, _ in spans)
        result |= {
            "kernels": len(kernels),
            "device_busy_ms": busy / 1e3,
            "device_window_ms": window / 1e3,
            "device_idle_share": 1 - busy / window if window else None,
        }
    result["longest"] = _ranked(ranked, top)
    return result


def _is_device(event: Any) -> bool:
    """Whether an event is work of the device, and no range that somebody marked on it."""
    if getattr(event, "is_user_annotation", False):
        return False
    return "CPU" not in str(getattr(event, "device_type", "CPU")).upper()


def _ranked(events: list[Any], top: int) -> list[dict[str, Any]]:
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in events:
        times[event.name] += event.time_range.end - event.time_range.start
        counts[event.name] += 1
    whole = sum(times.values()) or 1
    return [
        {"name": short(name), "ms": time_ / 1e3, "share": time_ / whole, "calls": counts[name]}
        for name, time_ in times.most_common(top)
    ]


def short(name: str) -> str:
    """A kernel's name without template arguments, at most 80 characters."""
    before = ""
    while name != before:
        before, name = name, re.sub(r"<[^<>]*>", "", name)
    return name[:80]


def union(spans: list[tuple[float, float]]) -> float:
    """Length that intervals cover together, however they overlap."""
    covered, end = 0.0, float("-inf")
    for a, b in sorted(spans):
        covered += max(0.0, b - max(a, end))
        end = max(end, b)
    return covered


def _synchronising(top: int) -> dict[str, Any]:
    """Source lines at which torch itself says that an operation synchronises, in one step."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Otherwise torch warns of a place once.
        always = torch.is_warn_always_enabled()
        torch.set_warn_always(True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            take_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(always)
    lines = Counter(
        f"{'/'.join(one.filename.split('/')[-3:])}:{one.lineno}"
        for one in caught
        if "synchroniz" in str(one.message)
    )
    rows = [{"line": line, "times": times} for line, times in lines.most_common(top)]
    return {"synchronising_operations": sum(lines.values()), "synchronising_lines": rows}
