"""The predicted step as a trace, and a measured trace prepared to be shown beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from moe_train.run_folder.trace_events import Event, process, trace_event

MEASURED = 1000
"""Added to a measured rank's process number where it shares a file with predicted stages."""

CATEGORY = {
    "dispatch": "exchange", "combine": "exchange", "gather": "tensor", "scatter": "tensor",
    "ring": "tensor",     "send": "p2p", "gradients": "gradients", "optimizer": "optimizer",
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
        category = CATEGORY.get(facts["op"], "compute")
        for stage in range(len(ranks)) if facts["stage"] < 0 else (facts["stage"],):
            args = {"node": name, **_args(facts), "stage": stage}
            yield trace_event(facts["op"], category, facts["start"], facts["seconds"], stage, args)
    yield from _arrows(graph)


def _passes(graph: Any) -> dict[tuple[Any, ...], Event]:
    """One event a pass, from its first node to its last."""
    events: dict[tuple[Any, ...], Event] = {}
    for facts in graph.nodes.values():
        direction, stage = facts["direction"], facts["stage"]
        if direction == "update" or stage < 0 or (direction == "serve" and facts["op"] != "pass"):
            continue
        key = (direction, stage, facts["chunk"] if facts["chunk"] > 0 else 0,
               facts["microbatch"], facts["tick"])  # fmt: skip
        begin, end = 1e6 * facts["start"], 1e6 * facts["finish"]
        if key not in events:
            batch = facts["microbatch"]
            name = "serve" if direction == "serve" else f"{direction[0].upper()}{batch}"
            events[key] = trace_event(name, direction, facts["start"], facts["seconds"], stage,
                              _args(facts))  # fmt: skip
            continue
        event = events[key]
        first = min(event["ts"], begin)
        event["dur"] = max(event["ts"] + event["dur"], end) - first
        event["ts"] = first
    return events


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
        # Inside the events at both ends: a viewer binds an arrow to the event around it.
        middle = 1e6 * (a["start"] + a["finish"]) / 2
        yield {"ph": "s", "ts": middle, "pid": a["stage"], **shared}
        yield {"ph": "f", "bp": "e", "ts": 1e6 * b["start"], "pid": b["stage"], **shared}


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
