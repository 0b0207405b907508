"""The pieces of a config's passes, from the planner's own cost model.

Sums over a layer's pieces equal `moe_train.planner.cost.timing.LayerTime`; a message is paid by the
stage that sends it. The exchange's seconds are the exposed ones, shared out by what each of its
collectives takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.config.root import Config
from moe_train.parallel.batch import microbatches_per_step
from moe_train.parallel.layout import Layout
from moe_train.parallel.shapes import Assumptions, Shapes, shapes
from moe_train.planner.cost.calls import Call, end_calls, expert_calls, sum_of, tensor_calls
from moe_train.planner.cost.compute import Part, dense_parts
from moe_train.planner.cost.links import Sent, point_to_point
from moe_train.planner.cost.timing import (
    LayerTime,
    StepTime,
    end_times,
    layer_time,
    passes_of,
    served_times,
)
from moe_train.planner.memory.stages import stage_memory
from moe_train.planner.schedule.work import Ends, Piece, PipedWork, Place, SpanWork


def ranges(numbers: list[int]) -> str:
    """``1-4`` or ``1-2,9-10``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


class LayerPieces:
    """Pieces of one layer, one micro-batch: dense before the exchange, exchange, experts."""

    def __init__(self, config: Config, layout: Layout, z: Shapes, layer: LayerTime) -> None:
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
        self._both("attention", *_computed(attention))
        if layout.tensor > 1:
            self._both("scatter", sum_of(tensor, "forward", "scatter"),
                       sum_of(tensor, "backward", "scatter"))  # fmt: skip
        self._both("router", *_computed([named["router"]], tensor))
        if "shared expert" in named:
            self._both("shared expert", *_computed([named["shared expert"]]))
        self.backward.reverse()
        self.exchange = tuple(
            _exchange(config, layout, z, direction, exposed)
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
        return [_at(piece, layer, again) for piece in pieces]

    def whole_back(self, layer: int, *, recomputed: bool) -> list[Piece]:
        """The backward pass of `layer`."""
        dispatch, combine = self.exchange[1]
        pieces = [combine, Piece("experts", self.experts.backward), dispatch, *self.backward]
        first = self.whole(layer, again=True) if recomputed else []
        return first + [_at(piece, layer, False) for piece in pieces]


def _at(piece: Piece, layer: int, again: bool) -> Piece:
    return Piece(piece.op, piece.seconds, piece.bytes, layer, again)


def _computed(parts: list[Part], calls: Sequence[Call] = ()) -> tuple[Sent, Sent]:
    """Both passes of `parts`, with the router's collectives among `calls`."""
    passes = passes_of(parts)
    found = []
    for direction, computed in zip(("forward", "backward"), passes, strict=True):
        sent = sum_of(list(calls), direction, "router")
        found.append(sent._replace(seconds=computed + sent.seconds))
    return found[0], found[1]


def _exchange(
    config: Config, layout: Layout, z: Shapes, direction: str, exposed: float
) -> tuple[Piece, Piece]:
    """Dispatch and combine of one direction, whose `exposed` seconds they share."""
    calls = expert_calls(config, layout, z)
    whole = sum_of(calls, direction).seconds
    share = exposed / whole if whole else 0.0
    first, second = (
        Piece(op, sent.seconds * share, sent.intra + sent.inter)
        for op in ("dispatch", "combine")
        for sent in [sum_of(calls, direction, op)]
    )
    return first, second


def work_of(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions, time: StepTime
) -> PipedWork | SpanWork:
    """Everything a schedule of `config` in `layout` is made of.

    Args:
        time: the planner's step time, whose gradient and optimizer parts are taken over.
    """
    z = shapes(config, layout, vocab, assumptions)
    layer = layer_time(config, layout, z)
    pieces = LayerPieces(config, layout, z, layer)
    outer = _outer(config, layout, z)
    ends = _ends(config, layout, vocab, assumptions, z, time)
    whole = config.recomputed_layers
    if layout.span:
        return _span_work(config, layout, z, pieces, outer, ends, whole)
    forward: dict[tuple[int, int], tuple[Piece, ...]] = {}
    backward: dict[tuple[int, int], tuple[Piece, ...]] = {}
    for stage in range(layout.pipeline):
        for chunk in range(layout.virtual_pipeline):
            numbers = layout.stage_layers(stage, chunk)
            ahead = [piece for number in numbers for piece in pieces.whole(number)]
            back = [
                piece
                for number in reversed(numbers)
                for piece in pieces.whole_back(number, recomputed=number in whole)
            ]
            if (stage, chunk) == (layout.pipeline - 1, layout.virtual_pipeline - 1):
                ahead.append(outer["head"][0])
                back.insert(0, outer["head"][1])
            if (stage, chunk) == (0, 0):
                ahead.insert(0, outer["embedding"][0])
                back.append(outer["embedding"][1])
            forward[stage, chunk], backward[stage, chunk] = tuple(ahead), tuple(back)
    return PipedWork(
        layout.pipeline, layout.virtual_pipeline, time.microbatches, forward, backward, ends
    )


def _outer(config: Config, layout: Layout, z: Shapes) -> dict[str, tuple[Piece, Piece]]:
    """Embedding and head, forward and backward."""
    calls = end_calls(config, layout, z)
    found = {}
    for name, times in end_times(config, layout, z).items():
        ahead, back = (sum_of(calls, direction, name) for direction in ("forward", "backward"))
        found[name] = (
            Piece(name, times.forward, ahead.intra + ahead.inter),
            Piece(name, times.backward, back.intra + back.inter),
        )
    return found


def _span_work(
    config: Config, layout: Layout, z: Shapes, pieces: LayerPieces,
    outer: dict[str, tuple[Piece, Piece]], ends: Ends, whole: frozenset[int],
) -> SpanWork:  # fmt: skip
    stages = layout.pipeline
    served = [served_times(config, z, active, stages) for active in range(stages + 1)]
    again = 1 if "moe" in config.recompute.modules else 0
    repeated = tuple(
        frozenset(i for i, number in enumerate(layout.stage_layers(stage)) if number in whole)
        for stage in range(stages)
    )
    return SpanWork(
        stages=stages,
        microbatches=microbatches_per_step(config, layout.data),
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
        delay=int(config.parallel.overlap_expert_comm),
    )


def _ends(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions, z: Shapes, time: StepTime
) -> Ends:
    stages, block = layout.pipeline, layout.ranks_per_stage
    messages, kept, places = [], [], []
    for stage in range(stages):
        sent = point_to_point(layout, config.hardware, stage, z.N * z.H * z.b)
        messages.append(Piece("send", sent.seconds, sent.intra + sent.inter))
        kept.append(stage_memory(config, layout, vocab, stage, assumptions).one_microbatch)
        ranks = range(stage * block, (stage + 1) * block)
        held = {expert for rank in ranks for expert in layout.local_experts(rank)}
        places.append(
            Place(
                ranges(list(ranks)),
                tuple(
                    ranges(layout.stage_layers(stage, chunk))
                    for chunk in range(layout.virtual_pipeline)
                ),
                ranges(sorted(held)),
            )
        )
    return Ends(
        tuple(messages), tuple(kept), Piece("gradients", time.gradients),
        Piece("optimizer", time.optimizer), tuple(places),
    )  # fmt: skip
