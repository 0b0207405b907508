"""``trace.json``: events of the Trace Event Format, which Perfetto and chrome://tracing open.

A predicted step (`moe_train.planner.schedule.trace`) has one process a pipeline stage; a measured
one (`moe_train.callbacks.trace`) has one a rank. Both name passes alike (``F3``: forward pass of
micro-batch 3) and use the same categories, so that one file can hold them side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_train.errors import ConfigError

Event = dict[str, Any]

CATEGORIES = (
    "forward", "backward", "serve", "compute", "exchange", "tensor", "p2p", "gradients",
    "optimizer", "other",
)  # fmt: skip
"""Categories of events with a duration, in predicted and measured traces."""


def process(number: int, name: str, place: int) -> list[Event]:
    """Name a process; `place` sorts it among the others."""
    return [
        {"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": number, "tid": 0,
         "args": {"sort_index": place}},
    ]  # fmt: skip


def trace_event(
    name: str, category: str, start: float, seconds: float, number: int, args: dict[str, Any],
    track: int = 0,
) -> Event:  # fmt: skip
    """An event with a duration in process `number`; `start` in seconds from the step's beginning.

    Args:
        track: events of one track are nested or do not overlap.
    """
    return {
        "ph": "X", "name": name, "cat": category, "ts": 1e6 * start, "dur": 1e6 * seconds,
        "pid": number, "tid": track, "args": args,
    }  # fmt: skip


def trace_text(events: Iterable[Event], facts: dict[str, Any]) -> str:
    """A whole trace file; a viewer shows `facts` as metadata."""
    data = {"displayTimeUnit": "ms", "otherData": facts, "traceEvents": list(events)}
    return json.dumps(data) + "\n"


def read_trace(option: str, path: Path) -> tuple[list[Event], dict[str, Any]]:
    """Events of a trace file, and its metadata.

    Raises:
        ConfigError: it cannot be read, or is not a trace.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(option, f"{path}: {error}", "give a run's trace.json") from error
    faults = check_trace(data)
    if faults:
        raise ConfigError(option, f"{path} is not a trace: {faults[0]}", "give a run's trace.json")
    return data["traceEvents"], dict(data.get("otherData", {}))


def duration(events: Iterable[Event]) -> float:
    """Seconds from the start of the first event to the end of the last."""
    times = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["ph"] == "X"]
    begin, end = min(s for s, _ in times), max(e for _, e in times)
    return float(end - begin) * 1e-6


def check_trace(data: Any) -> list[str]:
    """Violations of the format's JSON object form; empty for a trace."""
    if not isinstance(data, dict) or not isinstance(data.get("traceEvents"), list):
        return ["there is no list `traceEvents`"]
    faults: list[str] = []
    flows: dict[Any, list[str]] = {}
    for index, event in enumerate(data["traceEvents"]):
        wrong = _event_fault(event)
        if wrong:
            faults.append(f"event {index}: {wrong}")
        elif event["ph"] in "sf":
            flows.setdefault(event["id"], []).append(event["ph"])
    faults += [f"arrow {key} has ends {ends}" for key, ends in flows.items() if
               sorted(ends) != ["f", "s"]]  # fmt: skip
    return faults


def _event_fault(event: Any) -> str:
    if not isinstance(event, dict):
        return "not an object"
    phase = event.get("ph")
    if phase not in ("X", "M", "s", "f"):
        return f"phase {phase!r}"
    if not all(isinstance(event.get(key), int) for key in ("pid", "tid")):
        return "pid or tid is not an integer"
    if not isinstance(event.get("name"), str):
        return "no name"
    if phase == "M":
        known = {"process_name": "name", "process_sort_index": "sort_index"}
        key = known.get(event["name"])
        return "" if key and key in event.get("args", {}) else f"metadata {event['name']!r}"
    times = ("ts", "dur") if phase == "X" else ("ts",)
    for key in times:
        value = event.get(key)
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            return f"{key} is {value!r}"
    if phase == "X" and event.get("cat") not in CATEGORIES:
        return f"category {event.get('cat')!r}"
    return "" if phase == "X" or "id" in event else "an arrow without id"
