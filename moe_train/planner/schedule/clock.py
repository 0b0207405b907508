"""When everything happens: the longest path, where each stage does one thing at a time.

The schedule's order is part of the graph (edges ``order`` and ``lockstep``), so the longest path
through it is the step's time. It can never be shorter than the busiest stage's work (resources),
nor than the longest path of data alone (dependencies).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx as nx

from moe_train.planner.schedule.builder import EVERY, SCHEDULED


@dataclass(frozen=True)
class Timing:
    """What the clock found; seconds."""

    step: float
    pipeline: float
    """Until the last backward pass ends."""
    busy: tuple[float, ...]
    """Work of each stage in the pipeline."""
    resource_bound: float
    """The busiest stage's work in the whole step."""
    dependency_bound: float
    """The longest path of data alone."""
    critical: tuple[str, ...]
    """One longest path, first node to last."""

    @property
    def bubble(self) -> float:
        """Share of the pipeline's time in which a stage waits, over all stages."""
        whole = self.pipeline * len(self.busy)
        return 1 - sum(self.busy) / whole if whole else 0.0


def run_clock(graph: Any) -> Timing:
    """Give every node ``start``, ``finish``, ``slack`` and ``critical``; returns the totals."""
    order = list(nx.topological_sort(graph))
    nodes = graph.nodes
    for name in order:
        facts = nodes[name]
        facts["start"] = max((nodes[p]["finish"] for p in graph.predecessors(name)), default=0.0)
        facts["finish"] = facts["start"] + facts["seconds"]
    step = max((nodes[name]["finish"] for name in order), default=0.0)
    latest: dict[str, float] = {}
    for name in reversed(order):
        latest[name] = min(
            (latest[s] - nodes[s]["seconds"] for s in graph.successors(name)), default=step
        )
        nodes[name]["slack"] = max(0.0, latest[name] - nodes[name]["finish"])
        nodes[name]["critical"] = nodes[name]["slack"] <= 1e-12 * step
    piped = [name for name in order if nodes[name]["direction"] != "update"]
    return Timing(
        step=step,
        pipeline=max((nodes[name]["finish"] for name in piped), default=0.0),
        busy=_busy(graph, piped),
        resource_bound=max(_busy(graph, order), default=0.0),
        dependency_bound=_dependencies(graph, order),
        critical=_critical(graph, order),
    )


def _busy(graph: Any, names: list[str]) -> tuple[float, ...]:
    stages = {facts["stage"] for _, facts in graph.nodes(data=True)} - {EVERY}
    spent = dict.fromkeys(sorted(stages), 0.0)
    for name in names:
        facts = graph.nodes[name]
        for stage in spent if facts["stage"] == EVERY else (facts["stage"],):
            spent[stage] += facts["seconds"]
    return tuple(spent.values())


def _dependencies(graph: Any, order: list[str]) -> float:
    finish: dict[str, float] = {}
    for name in order:
        needed = (
            finish[source]
            for source, _, kind in graph.in_edges(name, data="kind")
            if kind not in SCHEDULED
        )
        finish[name] = max(needed, default=0.0) + graph.nodes[name]["seconds"]
    return max(finish.values(), default=0.0)


def _critical(graph: Any, order: list[str]) -> tuple[str, ...]:
    if not order:
        return ()
    nodes = graph.nodes
    path = [max(order, key=lambda name: nodes[name]["finish"])]
    while before := list(graph.predecessors(path[-1])):
        path.append(max(before, key=lambda name: nodes[name]["finish"]))
    return tuple(reversed(path))
