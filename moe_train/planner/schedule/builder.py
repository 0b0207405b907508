"""Adds work to a graph so that a stage does one thing at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import networkx as nx

from moe_train.planner.schedule.work import Ends, Piece

SCHEDULED = ("order", "lockstep")
"""Kinds of edges that the schedule adds to what the data asks for."""

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
        """`target` needs `source`; what data asks for replaces what the schedule adds."""
        known = self.graph.get_edge_data(source, target)
        if known is None or known["kind"] in SCHEDULED:
            self.graph.add_edge(source, target, kind=kind, bytes=size)

    def update(self, stages: Iterable[int]) -> None:
        """End the step: every optimizer needs the gradient norm, and so every stage."""
        stages = list(stages)
        reduced = [
            self.node(f"gradients@{stage}", self.ends.gradients, [stage], direction="update")
            for stage in stages
        ]
        for stage in stages:
            name = self.node(f"optimizer@{stage}", self.ends.optimizer, [stage], direction="update")
            for source in reduced:
                self.edge(source, name, "norm", 8.0)
