"""The graph of GPipe, 1F1B and interleaved 1F1B.

Nodes, with A pieces to a layer's forward pass, L layers of which C are recomputed, P stages of v
chunks and M micro-batches:

    by stage  2 v P M + 2 P
    by layer  M (2 L A + C A + 4 + 2 (v P - 1)) + 2 P

where the 4 are embedding and head, forward and backward, 2 (v P - 1) the messages between chunks,
and 2 P the gradient reductions and optimizers. A is 5 (attention, router, dispatch, experts,
combine), plus 2 with tensor parallelism (gather, scatter), plus 1 with a shared expert.
"""

from __future__ import annotations

from typing import Any

from moe_train.features.schedules import (
    BACKWARD,
    FORWARD,
    SCHEDULES,
    Pass,
    Pipeline,
)
from moe_train.planner.schedule.graph import Builder
from moe_train.planner.schedule.work import Piece, PipedWork, total


def piped_graph(work: PipedWork, kind: str, detail: str) -> Any:
    """Directed acyclic graph (networkx) of one step.

    Args:
        kind: name of a schedule that has an order.
        detail: ``stage`` for one node a pass, ``layer`` for one node a piece.
    """
    order = SCHEDULES[kind].order
    assert order is not None, kind
    sizes = Pipeline(work.stages, work.microbatches, work.chunks, work.delay)
    builder = Builder(work.ends)
    passes: dict[Pass, tuple[str, str, str]] = {}
    for stage in range(work.stages):
        for one in order(sizes, stage):
            passes[one] = _add(builder, work, one, detail)
    for one, (first, computed, _) in passes.items():
        if one.direction == FORWARD:
            back = passes[one._replace(direction=BACKWARD)]
            builder.edge(computed, back[0], "saved", work.ends.saved[one.stage])
        source = _source(work, one)
        if source is not None:
            sent = passes[source][2]
            link = source.stage if one.direction == FORWARD else one.stage
            kind_of_edge = "activation" if one.direction == FORWARD else "gradient"
            builder.edge(sent, first, kind_of_edge, work.ends.messages[link].bytes)
    builder.update(range(work.stages))
    return builder.graph


def _source(work: PipedWork, one: Pass) -> Pass | None:
    """The pass whose message `one` needs: of the previous position, or the next one backward."""
    step = -1 if one.direction == FORWARD else 1
    position = one.chunk * work.stages + one.stage + step
    if not 0 <= position < work.stages * work.chunks:
        return None
    chunk, stage = divmod(position, work.stages)
    return one._replace(chunk=chunk, stage=stage)


def _pieces(work: PipedWork, one: Pass) -> list[Piece]:
    table = work.forward if one.direction == FORWARD else work.backward
    return list(table[one.stage, one.chunk])


def _message(work: PipedWork, one: Pass) -> Piece | None:
    """What the stage sends when the pass is done."""
    ahead = one.direction == FORWARD
    position = one.chunk * work.stages + one.stage
    if position == (work.stages * work.chunks - 1 if ahead else 0):
        return None
    return work.ends.messages[one.stage if ahead else (one.stage - 1) % work.stages]


def _add(builder: Builder, work: PipedWork, one: Pass, detail: str) -> tuple[str, str, str]:
    """Add a pass; returns its first node, its last computing one and its last."""
    name = f"{one.direction[0].upper()}{one.microbatch}@{one.stage}"
    name += f".{one.chunk}" if work.chunks > 1 else ""
    pieces, message = _pieces(work, one), _message(work, one)

    def add(label: str, piece: Piece, after: str) -> str:
        return builder.node(
            label, piece, [one.stage], direction=one.direction, chunk=one.chunk,
            microbatch=one.microbatch, after=after,
        )  # fmt: skip

    if detail == "stage":
        whole = [*pieces, *([message] if message else [])]
        add(name, Piece("pass", total(whole), sum(piece.bytes for piece in whole)), "order")
        return name, name, name
    labels: list[str] = []
    for piece in pieces:
        labels.append(add(piece_name(name, piece), piece, "layer" if labels else "order"))
    last = add(f"{name}/send", message, "layer") if message else labels[-1]
    return labels[0], labels[-1], last


def piece_name(prefix: str, piece: Piece) -> str:
    """Such as ``B3@0/L5/again/attention``."""
    layer = f"/L{piece.layer}" if piece.layer else ""
    return f"{prefix}{layer}{'/again' if piece.again else ''}/{piece.op}"
