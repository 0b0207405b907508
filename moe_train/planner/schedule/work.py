"""Pieces of work of a schedule, with their seconds and bytes, from the planner's own cost model.

Sums over a layer's pieces equal `moe_train.planner.cost.passes.LayerTime`; a message is paid by the
stage that sends it. The exchange's seconds are the exposed ones, shared out by what each of its
collectives takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moe_train.parallel.layout import ranges
from moe_train.planner.cost.calls import (
    Call,
    end_calls,
    expert_calls,
    ring_calls,
    sum_of,
    tensor_calls,
)
from moe_train.planner.cost.communication import gradient_traffic
from moe_train.planner.cost.compute import Part, dense_parts
from moe_train.planner.cost.links import Sent, point_to_point
from moe_train.planner.cost.passes import (
    LayerTime,
    end_times,
    feed_forward_time,
    passes_of,
    served_times,
)
from moe_train.planner.cost.timing import StepTime
from moe_train.planner.memory.stages import stage_memory
from moe_train.planner.plan import Plan

COMPUTE = ("attention", "router", "shared expert", "experts", "embedding", "head")
TENSOR = ("gather", "scatter")
EXCHANGE = ("dispatch", "combine")


@dataclass(frozen=True)
class Piece:
    """A part of a pass that runs without interruption."""

    op: str
    """One of COMPUTE, TENSOR, EXCHANGE, or ring, send, gradients, optimizer."""
    seconds: float
    bytes: float = 0.0
    """Sent by each rank; 0 for compute."""
    layer: int = 0
    """1-based; 0 where it belongs to none."""
    again: bool = False
    """Whether it is recomputed in the backward pass."""


@dataclass(frozen=True)
class Place:
    """Ranks, layers and experts of a stage, as text for graph files."""

    ranks: str
    """Ranks of the stage, e.g. ``0-1``; of all replicas."""
    layers: tuple[str, ...]
    """1-based layers by model chunk."""
    experts: str
    """0-based experts of a layer that live on the stage's ranks."""


@dataclass(frozen=True)
class Ends:
    """Messages, saved activations and the update around the passes, per stage."""

    messages: tuple[Piece, ...]
    """Entry s: from stage s to the next one, or back (the last entry closes the ring)."""
    saved: tuple[float, ...]
    """Bytes of activations that a stage saves for one micro-batch (and chunk)."""
    gradients: tuple[Piece, ...]
    """Reduction of a stage's gradients and gather of its weights, by stage."""
    optimizer: Piece
    places: tuple[Place, ...]


@dataclass(frozen=True)
class PipedWork:
    """Passes by (stage, chunk); for GPipe, 1F1B and interleaved 1F1B."""

    stages: int
    chunks: int
    microbatches: int
    forward: Mapping[tuple[int, int], tuple[Piece, ...]]
    backward: Mapping[tuple[int, int], tuple[Piece, ...]]
    ends: Ends
    delay: int = 0
    """See `moe_train.features.schedules.Pipeline`."""


@dataclass(frozen=True)
class SpanWork:
    """Slots of ``placement=span``: dense pieces of the active stages around the exchange."""

    stages: int
    microbatches: int
    local_layers: int
    forward: tuple[Piece, ...]
    """Dense pieces of one layer before its exchange."""
    backward: tuple[Piece, ...]
    """Dense pieces of one layer after the mirrored exchange."""
    repeated: tuple[frozenset[int], ...]
    """Local layers that a stage recomputes, by stage."""
    exchange: tuple[Piece, Piece]
    """Dispatch and combine of one layer, forward."""
    exchange_back: tuple[Piece, Piece]
    """The same, backward."""
    experts_forward: tuple[float, ...]
    """Seconds on every rank, by the number of active stages (0 to P)."""
    experts_backward: tuple[float, ...]
    embedding: tuple[Piece, Piece]
    """Forward and backward, on the first stage."""
    head: tuple[Piece, Piece]
    """Forward and backward, on the last stage."""
    ends: Ends
    delay: int = 0
    """1 where a tick's slots overlap and hide each other's exchange, see
    `moe_train.features.schedules.ticks`."""


def total(pieces: tuple[Piece, ...] | list[Piece]) -> float:
    """Seconds of pieces that run one after the other."""
    return sum(piece.seconds for piece in pieces)


class LayerPieces:
    """Pieces of one layer, one micro-batch: dense before the exchange, exchange, experts.

    Args:
        dense: whether it is a layer with a feed-forward network, whose exchange and experts then
            take no time.
    """

    def __init__(self, plan: Plan, layer: LayerTime, *, dense: bool = False) -> None:
        config, layout, z = plan.config, plan.layout, plan.shapes
        if dense:
            z = z.dense(config.model.dense_hidden)
        named = {part.name: part for part in dense_parts(config, z)}
        alone = ("router", "shared expert")
        attention = [part for name, part in named.items() if name not in alone]
        tensor = tensor_calls(config, layout, z)
        self.forward: list[Piece] = []
        self.backward: list[Piece] = []
        # The backward pass gathers again where it scattered; its pieces run in reverse.
        if layout.tensor > 1:
            self._both("gather", sum_of(tensor, "forward", "gather"),
                       sum_of(tensor, "backward", "gather"))  # fmt: skip
        # The device waits for launches before the products that follow the exchange's counts.
        self._both("attention", *_waiting(_computed(attention), layer))
        if ring := ring_calls(config, layout, z):
            # What is waited for beyond the steps of attention that hide the rest.
            ways = zip(("forward", "backward"), layer.ring, strict=True)
            sent = (sum_of(ring, way)._replace(seconds=left) for way, left in ways)
            self._both("ring", *sent)
        if layout.tensor > 1:
            self._both("scatter", sum_of(tensor, "forward", "scatter"),
                       sum_of(tensor, "backward", "scatter"))  # fmt: skip
        self._both("router", *_computed([named["router"]], () if dense else tensor))
        if "shared expert" in named:
            self._both("shared expert", *_computed([named["shared expert"]]))
        self.backward.reverse()
        nothing = Piece("dispatch", 0.0), Piece("combine", 0.0)
        self.exchange = tuple(
            nothing if dense else _exchange(plan, direction, exposed)
            for direction, exposed in zip(("forward", "backward"), layer.exchange, strict=True)
        )
        self.experts = layer.experts

    def _both(self, op: str, forward: Sent, backward: Sent) -> None:
        for pieces, sent in ((self.forward, forward), (self.backward, backward)):
            pieces.append(Piece(op, sent.seconds, sent.intra + sent.inter))

    def whole(self, layer: int, *, again: bool = False) -> list[Piece]:
        """The forward pass of `layer`, exchange and experts included."""
        dispatch, combine = self.exchange[0]
        pieces = [*self.forward, dispatch, Piece("experts", self.experts.forward), combine]
        return [replace(piece, layer=layer, again=again) for piece in pieces]

    def whole_back(self, layer: int, *, recomputed: bool) -> list[Piece]:
        """The backward pass of `layer`."""
        dispatch, combine = self.exchange[1]
        pieces = [combine, Piece("experts", self.experts.backward), dispatch, *self.backward]
        first = self.whole(layer, again=True) if recomputed else []
        return first + [replace(piece, layer=layer) for piece in pieces]


def _waiting(passes: tuple[Sent, Sent], layer: LayerTime) -> tuple[Sent, Sent]:
    """Both passes with the layer's waits for the host."""
    ahead, back = (
        one._replace(seconds=one.seconds + wait)
        for one, wait in zip(passes, layer.waiting, strict=True)
    )
    return ahead, back


def _computed(parts: list[Part], calls: Sequence[Call] = ()) -> tuple[Sent, Sent]:
    """Both passes of `parts`, with the router's collectives among `calls`."""
    passes = passes_of(parts)
    ahead, back = (sum_of(calls, direction, "router") for direction in ("forward", "backward"))
    return (
        ahead._replace(seconds=passes.forward + ahead.seconds),
        back._replace(seconds=passes.backward + back.seconds),
    )


def _exchange(plan: Plan, direction: str, exposed: float) -> tuple[Piece, Piece]:
    """Dispatch and combine of one direction, whose `exposed` seconds they share."""
    calls = expert_calls(plan.config, plan.layout, plan.shapes)
    whole = sum_of(calls, direction).seconds
    share = exposed / whole if whole else 0.0
    sent = [sum_of(calls, direction, op) for op in ("dispatch", "combine")]
    first, second = (Piece("", one.seconds * share, one.intra + one.inter) for one in sent)
    return replace(first, op="dispatch"), replace(second, op="combine")


def work_of(plan: Plan, time: StepTime) -> PipedWork | SpanWork:
    """All work that a schedule of `plan` consists of.

    Args:
        time: the planner's step time, whose layer, gradient and optimizer parts are used.
    """
    layout, whole = plan.layout, plan.config.recomputed_layers
    pieces, outer, ends = LayerPieces(plan, time.layer), _outer(plan), _ends(plan, time)
    if layout.span:
        return _span_work(plan, time.layer, pieces, outer, ends)
    first = plan.config.model.dense_layers
    plain = LayerPieces(plan, feed_forward_time(plan), dense=True) if first else pieces
    forward: dict[tuple[int, int], tuple[Piece, ...]] = {}
    backward: dict[tuple[int, int], tuple[Piece, ...]] = {}
    for stage in range(layout.pipeline):
        for chunk in range(layout.virtual_pipeline):
            numbers = layout.stage_layers(stage, chunk)
            of = {number: plain if number <= first else pieces for number in numbers}
            ahead = [piece for number in numbers for piece in of[number].whole(number)]
            back = [
                piece
                for number in reversed(numbers)
                for piece in of[number].whole_back(number, recomputed=number in whole)
            ]
            if (stage, chunk) == (layout.pipeline - 1, layout.virtual_pipeline - 1):
                ahead.append(outer["head"][0])
                back.insert(0, outer["head"][1])
            if (stage, chunk) == (0, 0):
                ahead.insert(0, outer["embedding"][0])
                back.append(outer["embedding"][1])
            forward[stage, chunk], backward[stage, chunk] = tuple(ahead), tuple(back)
    return PipedWork(
        stages=layout.pipeline,
        chunks=layout.virtual_pipeline,
        microbatches=time.microbatches,
        forward=forward,
        backward=backward,
        ends=ends,
        delay=plan.delay,
    )


def _outer(plan: Plan) -> dict[str, tuple[Piece, Piece]]:
    """Embedding and head, forward and backward."""
    calls = end_calls(plan.config, plan.layout, plan.shapes)
    outer = {}
    for name, times in end_times(plan).items():
        ahead, back = (sum_of(calls, direction, name) for direction in ("forward", "backward"))
        outer[name] = (
            Piece(name, times.forward, ahead.intra + ahead.inter),
            Piece(name, times.backward, back.intra + back.inter),
        )
    return outer


def _span_work(
    plan: Plan,
    layer: LayerTime,
    pieces: LayerPieces,
    outer: dict[str, tuple[Piece, Piece]],
    ends: Ends,
) -> SpanWork:
    layout, whole = plan.layout, plan.config.recomputed_layers
    served = [served_times(plan, layer, active) for active in range(layout.pipeline + 1)]
    again = 1 if "moe" in plan.config.recompute.modules else 0
    repeated = tuple(
        frozenset(i for i, number in enumerate(layout.stage_layers(stage)) if number in whole)
        for stage in range(layout.pipeline)
    )
    return SpanWork(
        stages=layout.pipeline,
        microbatches=plan.microbatches,
        local_layers=len(layout.stage_layers(0)),
        forward=tuple(pieces.forward),
        backward=tuple(pieces.backward),
        repeated=repeated,
        exchange=pieces.exchange[0],
        exchange_back=pieces.exchange[1],
        experts_forward=tuple(each.forward for each in served),
        experts_backward=tuple(each.backward + again * each.forward for each in served),
        embedding=outer["embedding"],
        head=outer["head"],
        ends=ends,
        delay=plan.delay,
    )


def _ends(plan: Plan, time: StepTime) -> Ends:
    layout, z = plan.layout, plan.shapes
    messages, saved, places, gradients = [], [], [], []
    for stage in range(layout.pipeline):
        sent = point_to_point(layout, plan.config.hardware, stage, z.N * z.H * z.b)
        messages.append(Piece("send", sent.seconds, sent.intra + sent.inter))
        saved.append(stage_memory(plan, stage).one_microbatch)
        reduced = gradient_traffic(plan.config, layout, plan.parameters(stage))
        size = sum(sent.intra + sent.inter for _, _, sent in reduced)
        gradients.append(Piece("gradients", time.gradients, size))
        ranks = layout.stage_ranks(stage)
        experts = {expert for rank in ranks for expert in layout.local_experts(rank)}
        chunks = range(layout.virtual_pipeline)
        places.append(
            Place(
                ranges(list(ranks)),
                tuple(ranges(layout.stage_layers(stage, chunk)) for chunk in chunks),
                ranges(sorted(experts)),
            )
        )
    return Ends(
        tuple(messages), tuple(saved), tuple(gradients),
        Piece("optimizer", time.optimizer), tuple(places),
    )  # fmt: skip
