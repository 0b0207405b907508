"""The graph of an optimizer step, and its times: each stage does one thing at a time.

The schedule's order is part of the graph (edges ``order`` and ``lockstep``), so the longest path
through it is the step's time. It can never be shorter than the busiest stage's work (resources),
nor than the longest path of data alone (dependencies).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from moe_train.planner.schedule.work import Ends, Piece

SCHEDULED = ("order", "lockstep")
"""Kinds of edges that the schedule adds to data dependencies."""

EVERY = -1
"""Stage of a node that all stages take part in; also: no chunk, micro-batch or tick."""


class Builder:
    """A growing graph; nodes that share a stage are chained in the order of their arrival."""

    def __init__(self, ends: Ends) -> None:
        self.graph = nx.DiGraph()
        self.ends = ends
        self._tail: dict[int, str] = {}

    def node(
        self,
        name: str,
        piece: Piece,
        stages: Sequence[int],
        *,
        direction: str,
        chunk: int = EVERY,
        microbatch: int = EVERY,
        tick: int = EVERY,
        after: str = "order",
        layers: str = "",
    ) -> str:
        """Add a node that occupies `stages` and follows what they did before.

        Args:
            after: kind of the edges from the stages' previous nodes.
            layers: 1-based layers, where the piece does not know them.
        """
        assert name not in self.graph, f"{name} twice"
        places = self.ends.places
        alone = len(stages) == 1
        place = places[stages[0]]
        if not layers:
            layers = place.layers[max(chunk, 0)] if alone else ""
        facts: dict[str, Any] = {
            "op": piece.op,
            "direction": direction,
            "stage": stages[0] if alone else EVERY,
            "chunk": chunk,
            "microbatch": microbatch,
            "tick": tick,
            "layers": str(piece.layer) if piece.layer else layers,
            "again": piece.again,
            "ranks": place.ranks if alone else ",".join(places[one].ranks for one in stages),
            "experts": place.experts if alone else ",".join(places[one].experts for one in stages),
            "seconds": piece.seconds,
            "bytes": piece.bytes,
        }
        self.graph.add_node(name, **facts)
        for stage in stages:
            if stage in self._tail:
                self.edge(self._tail[stage], name, after)
            self._tail[stage] = name
        return name

    def tail(self, stage: int) -> str:
        """The last node of `stage`."""
        return self._tail[stage]

    def edge(self, source: str, target: str, kind: str, size: float = 0.0) -> None:
        """`target` needs `source`; a data dependency replaces an edge of the schedule."""
        known = self.graph.get_edge_data(source, target)
        if known is None or known["kind"] in SCHEDULED:
            self.graph.add_edge(source, target, kind=kind, bytes=size)

    def update(self, stages: Iterable[int]) -> None:
        """End the step: every optimizer needs the gradient norm, and so every stage."""
        stages = list(stages)
        reduced = [
            self.node(f"gradients@{stage}", self.ends.gradients[stage], [stage], direction="update")
            for stage in stages
        ]
        for stage in stages:
            name = self.node(f"optimizer@{stage}", self.ends.optimizer, [stage], direction="update")
            for source in reduced:
                self.edge(source, name, "norm", 8.0)


@dataclass(frozen=True)
class Timing:
    """Times of a graph; seconds."""

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


def time_graph(graph: Any) -> Timing:
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
