"""Events of the Trace Event Format, which Perfetto and chrome://tracing open.

A predicted step has one process a pipeline stage; a measured one (`moe_train.callbacks.trace`) has
one a rank. Both name passes alike (``F3``: forward pass of micro-batch 3) and use the same
categories, so that they can be laid side by side in one file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_train.errors import ConfigError

Event = dict[str, Any]

CATEGORIES = (
    "forward", "backward", "serve", "compute", "exchange", "tensor", "p2p", "gradients",
    "optimizer", "other",
)  # fmt: skip
"""Categories of spans in predicted and measured traces."""

MEASURED = 1000
"""Added to a measured rank's process number where it shares a file with predicted stages."""

_CATEGORY = {
    "dispatch": "exchange", "combine": "exchange", "gather": "tensor", "scatter": "tensor",
    "send": "p2p", "gradients": "gradients", "optimizer": "optimizer",
}  # fmt: skip


def process(number: int, name: str, place: int) -> list[Event]:
    """Name a process; `place` sorts it among the others."""
    return [
        {"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": number, "tid": 0,
         "args": {"sort_index": place}},
    ]  # fmt: skip


def span(
    name: str, category: str, start: float, seconds: float, number: int, args: dict[str, Any],
    track: int = 0,
) -> Event:  # fmt: skip
    """A span of process `number`; `start` in seconds from the step's beginning.

    Args:
        track: spans of one track lie inside one another or apart.
    """
    return {
        "ph": "X", "name": name, "cat": category, "ts": 1e6 * start, "dur": 1e6 * seconds,
        "pid": number, "tid": track, "args": args,
    }  # fmt: skip


def predicted_events(graph: Any, ranks: list[str]) -> Iterator[Event]:
    """Events of a timed graph.

    Args:
        ranks: of each stage, for the processes' names.
    """
    for stage, some in enumerate(ranks):
        yield from process(stage, f"stage {stage}, ranks {some} (predicted)", stage * MEASURED)
    yield from _passes(graph).values()
    for name, facts in graph.nodes(data=True):
        if facts["op"] == "pass":
            continue
        category = _CATEGORY.get(facts["op"], "compute")
        for stage in range(len(ranks)) if facts["stage"] < 0 else (facts["stage"],):
            args = {"node": name, **_args(facts), "stage": stage}
            yield span(facts["op"], category, facts["start"], facts["seconds"], stage, args)
    yield from _arrows(graph)


def _passes(graph: Any) -> dict[tuple[Any, ...], Event]:
    """One span a pass, from its first node to its last."""
    found: dict[tuple[Any, ...], Event] = {}
    for facts in graph.nodes.values():
        direction, stage = facts["direction"], facts["stage"]
        if direction == "update" or stage < 0 or (direction == "serve" and facts["op"] != "pass"):
            continue
        key = (direction, stage, facts["chunk"] if facts["chunk"] > 0 else 0,
               facts["microbatch"], facts["tick"])  # fmt: skip
        begin, end = 1e6 * facts["start"], 1e6 * facts["finish"]
        if key not in found:
            batch = facts["microbatch"]
            name = "serve" if direction == "serve" else f"{direction[0].upper()}{batch}"
            found[key] = span(name, direction, facts["start"], facts["seconds"], stage,
                              _args(facts))  # fmt: skip
            continue
        event = found[key]
        first = min(event["ts"], begin)
        event["dur"] = max(event["ts"] + event["dur"], end) - first
        event["ts"] = first
    return found


def _args(facts: dict[str, Any]) -> dict[str, Any]:
    names = ("stage", "chunk", "microbatch", "tick", "layers", "ranks", "bytes", "critical")
    return {name: facts[name] for name in names if facts[name] not in (-1, "")}


def _arrows(graph: Any) -> Iterator[Event]:
    """Messages between stages as flow arrows."""
    sent = [
        (source, target)
        for source, target, kind in graph.edges(data="kind")
        if kind in ("activation", "gradient")
    ]
    for number, (source, target) in enumerate(sent):
        a, b = graph.nodes[source], graph.nodes[target]
        if a["stage"] < 0 or b["stage"] < 0:
            continue
        shared = {"cat": "p2p", "name": "message", "id": number, "tid": 0}
        # Inside the spans at both ends: a viewer binds an arrow to the span around it.
        middle = 1e6 * (a["start"] + a["finish"]) / 2
        yield {"ph": "s", "ts": middle, "pid": a["stage"], **shared}
        yield {"ph": "f", "bp": "e", "ts": 1e6 * b["start"], "pid": b["stage"], **shared}


def trace_text(events: Iterable[Event], facts: dict[str, Any]) -> str:
    """A whole trace file; `facts` is what a viewer shows as its metadata."""
    data = {"displayTimeUnit": "ms", "otherData": facts, "traceEvents": list(events)}
    return json.dumps(data) + "\n"


def read_trace(option: str, path: Path) -> tuple[list[Event], dict[str, Any]]:
    """Events of a trace file, and the facts that stand beside them.

    Raises:
        ConfigError: it cannot be read, or is no trace.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(option, f"{path}: {error}", "give a run's trace.json") from error
    faults = check_trace(data)
    if faults:
        raise ConfigError(option, f"{path} is no trace: {faults[0]}", "give a run's trace.json")
    return data["traceEvents"], dict(data.get("otherData", {}))


def duration(events: Iterable[Event]) -> float:
    """Seconds from the first span's start to the last one's end."""
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["ph"] == "X"]
    begin, end = min(s for s, _ in spans), max(e for _, e in spans)
    return float(end - begin) * 1e-6


def measured_beside(events: Iterable[Event]) -> Iterator[Event]:
    """A run's events, its ranks numbered and sorted to stand under their predicted stages."""
    events = list(events)
    stages = {
        event["pid"]: event["args"]["stage"]
        for event in events
        if event["ph"] == "X" and "stage" in event.get("args", {})
    }
    for event in events:
        moved = {**event, "pid": event["pid"] + MEASURED}
        if event["ph"] == "M" and event["name"] == "process_sort_index":
            place = stages.get(event["pid"], 0) * MEASURED + 1 + event["pid"]
            moved["args"] = {"sort_index": place}
        yield moved


def check_trace(data: Any) -> list[str]:
    """What keeps `data` from being a trace in the JSON object form; empty if nothing does."""
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
        return "no object"
    phase = event.get("ph")
    if phase not in ("X", "M", "s", "f"):
        return f"phase {phase!r}"
    if not all(isinstance(event.get(key), int) for key in ("pid", "tid")):
        return "pid or tid is no integer"
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
