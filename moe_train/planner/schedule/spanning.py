"""The graph of the tick-aligned spanning schedule.

Slots (the forward or the backward part of a tick) follow one another; within one, all ranks of a
replica run the local layers together, and a stage without a micro-batch serves its experts to the
others. Nodes, with H = M + P - 1 slots each way, l = L / P local layers, D dense pieces to the
forward pass of a layer and C recomputed layers:

    by stage  2 P H + 2 P
    by layer  2 H l (2 + P) + M (2 L D + C D + 4 + 2 (P - 1)) + 2 P

By layer the two exchanges of a local layer are one node each for all stages, since no rank leaves
them before every rank has entered; the P is its experts, one node a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moe_train.features.schedules import BACKWARD, FORWARD, Tick, ticks
from moe_train.planner.schedule.graph import Builder
from moe_train.planner.schedule.piped import piece_name
from moe_train.planner.schedule.work import Piece, SpanWork, total

SERVE = "serve"
"""Direction of the work of a stage without a micro-batch in a slot."""


def span_graph(work: SpanWork, detail: str) -> Any:
    """Directed acyclic graph (networkx) of one step; `detail` is ``stage`` or ``layer``."""
    builder = Builder(work.ends)
    ends: dict[tuple[str, int, int], tuple[str, str]] = {}
    for tick in ticks(work.stages, work.microbatches, delay=work.delay):
        for direction, active in ((FORWARD, tick.forward), (BACKWARD, tick.backward)):
            if active:
                add = _stages if detail == "stage" else _layers
                exposed = _exposed(work, direction, tick)
                result = add(builder, exposed, direction, tick.number, active)
                for stage, names in result.items():
                    ends[direction, stage, active[stage]] = names
    for (direction, stage, batch), (first, last) in ends.items():
        if direction == FORWARD:
            back = ends[BACKWARD, stage, batch][0]
            builder.edge(last, back, "saved", work.ends.saved[stage])
            if stage:
                sent = ends[FORWARD, stage - 1, batch][1]
                builder.edge(sent, first, "activation", work.ends.messages[stage - 1].bytes)
        elif stage < work.stages - 1:
            sent = ends[BACKWARD, stage + 1, batch][1]
            builder.edge(sent, first, "gradient", work.ends.messages[stage].bytes)
    builder.update(range(work.stages))
    return builder.graph


def _exposed(work: SpanWork, direction: str, tick: Tick) -> SpanWork:
    """`work` with the part of this slot's exchanges that the tick's other slot does not hide.

    With a delay the slots overlap: one's exchange runs while the other computes, as in the
    planner's step time.
    """
    other, active = (BACKWARD, tick.backward) if direction == FORWARD else (FORWARD, tick.forward)
    exchange = _exchange(work, direction)
    whole = work.local_layers * total(exchange)
    if not (work.delay and active and whole):
        return work
    share = max(0.0, 1 - _computing(work, other, active) / whole)
    first, second = (replace(piece, seconds=share * piece.seconds) for piece in exchange)
    if direction == FORWARD:
        return replace(work, exchange=(first, second))
    return replace(work, exchange_back=(first, second))


def _exchange(work: SpanWork, direction: str) -> tuple[Piece, Piece]:
    return work.exchange if direction == FORWARD else work.exchange_back


def _computing(work: SpanWork, direction: str, active: Mapping[int, int]) -> float:
    """Seconds of computing in a slot: the experts, and the slowest active stage's dense work."""
    dense = max(
        total(_embedding(work, direction, stage))
        + total(_head(work, direction, stage))
        + sum(total(_dense(work, direction, stage, i)) for i in range(work.local_layers))
        for stage in active
    )
    return dense + work.local_layers * _experts(work, direction, len(active))


def _dense(work: SpanWork, direction: str, stage: int, local: int) -> list[Piece]:
    """Dense pieces of one layer: before its exchange (forward) or around it (backward)."""
    layer = stage * work.local_layers + local + 1
    pieces = list(work.forward)
    if direction == BACKWARD:
        again = [replace(piece, again=True) for piece in work.forward]
        pieces = (again if local in work.repeated[stage] else []) + list(work.backward)
    return [replace(piece, layer=layer) for piece in pieces]


def _head(work: SpanWork, direction: str, stage: int) -> list[Piece]:
    if stage < work.stages - 1:
        return []
    return [work.head[0 if direction == FORWARD else 1]]


def _embedding(work: SpanWork, direction: str, stage: int) -> list[Piece]:
    return [] if stage else [work.embedding[0 if direction == FORWARD else 1]]


def _message(work: SpanWork, direction: str, stage: int) -> list[Piece]:
    if direction == FORWARD:
        return [work.ends.messages[stage]] if stage < work.stages - 1 else []
    return [work.ends.messages[stage - 1]] if stage else []


def _experts(work: SpanWork, direction: str, active: int) -> float:
    return (work.experts_forward if direction == FORWARD else work.experts_backward)[active]


def _served(work: SpanWork, active: Mapping[int, int], local: int) -> str:
    """The layers, one of each active stage, whose tokens are exchanged together."""
    return ",".join(str(stage * work.local_layers + local + 1) for stage in active)


def _stages(
    builder: Builder, work: SpanWork, direction: str, tick: int, active: Mapping[int, int]
) -> dict[int, tuple[str, str]]:
    """One node a stage; the next slot begins when the slowest has ended."""
    before = [builder.tail(s) for s in range(work.stages)] if tick or direction == BACKWARD else []
    exchange = _exchange(work, direction)
    each = _experts(work, direction, len(active)) + total(exchange)
    result = {}
    for stage in range(work.stages):
        pieces = [Piece("experts", each * work.local_layers)]
        sent = work.local_layers * sum(piece.bytes for piece in exchange)
        if stage in active:
            for local in range(work.local_layers):
                pieces += _dense(work, direction, stage, local)
            pieces += _embedding(work, direction, stage)
            pieces += _head(work, direction, stage) + _message(work, direction, stage)
            name = f"{direction[0].upper()}{active[stage]}@{stage}"
        else:
            name = f"S{tick}{direction[0]}@{stage}"
        builder.node(
            name,
            Piece("pass", total(pieces), sent + sum(piece.bytes for piece in pieces)),
            [stage],
            direction=direction if stage in active else SERVE,
            chunk=0 if stage in active else -1,
            microbatch=active.get(stage, -1),
            tick=tick,
        )
        for source in before:
            builder.edge(source, name, "lockstep")
        if stage in active:
            result[stage] = (name, name)
    return result


def _layers(
    builder: Builder, work: SpanWork, direction: str, tick: int, active: Mapping[int, int]
) -> dict[int, tuple[str, str]]:
    """One node a piece; exchanges are shared by all stages."""
    stages = range(work.stages)
    first: dict[int, str] = {}
    slot = f"T{tick}{direction[0]}"

    def run(stage: int, pieces: list[Piece]) -> None:
        """A stage's own work; a piece follows what it received, so after data or an exchange."""
        prefix = f"{direction[0].upper()}{active[stage]}@{stage}"
        for piece in pieces:
            name = builder.node(
                piece_name(prefix, piece), piece, [stage], direction=direction, chunk=0,
                microbatch=active[stage], tick=tick, after="layer" if stage in first else "order",
            )  # fmt: skip
            first.setdefault(stage, name)

    def join(local: int, index: int) -> None:
        op = _exchange(work, direction)[index]
        name = f"{slot}/l{local}/{op.op}"
        builder.node(
            name, op, list(stages), direction=direction, tick=tick, after="lockstep",
            layers=_served(work, active, local),
        )  # fmt: skip
        for source in list(builder.graph.predecessors(name)):
            facts = builder.graph.nodes[source]
            ours = facts["tick"] == tick and facts["direction"] in (direction, SERVE)
            if ours and (facts["op"] == "experts" or facts["stage"] in active):
                builder.edge(source, name, "tokens", op.bytes)
        for stage in active:
            first.setdefault(stage, name)

    def serve(local: int) -> None:
        seconds = _experts(work, direction, len(active))
        for stage in stages:
            builder.node(
                f"{slot}/l{local}/experts@{stage}", Piece("experts", seconds), [stage],
                direction=direction if stage in active else SERVE, tick=tick, after="tokens",
                microbatch=active.get(stage, -1), layers=_served(work, active, local),
            )  # fmt: skip

    if direction == FORWARD:
        for stage in active:
            run(stage, _embedding(work, direction, stage))
        for local in range(work.local_layers):
            for stage in active:
                run(stage, _dense(work, direction, stage, local))
            join(local, 0)
            serve(local)
            join(local, 1)
    else:
        for stage in active:
            run(stage, _head(work, direction, stage))
        for local in reversed(range(work.local_layers)):
            for stage in active:
                pieces = _dense(work, direction, stage, local)
                run(stage, [piece for piece in pieces if piece.again])
            join(local, 1)
            serve(local)
            join(local, 0)
            for stage in active:
                pieces = _dense(work, direction, stage, local)
                run(stage, [piece for piece in pieces if not piece.again])
    for stage in active:
        end = _head if direction == FORWARD else _embedding
        run(stage, end(work, direction, stage))
        run(stage, _message(work, direction, stage))
    return {stage: (first[stage], builder.tail(stage)) for stage in active}
