"""The pieces of a config's passes, from the planner's own cost model.

Sums over a layer's pieces equal `moe_train.plan.cost.timing.LayerTime`; a message is paid by the
stage that sends it. The exchange's seconds are the exposed ones, shared out by bytes.
"""

from __future__ import annotations

from moe_train.config.layers import parse_layers
from moe_train.config.root import Config
from moe_train.plan.cost.communication import layer_traffic
from moe_train.plan.cost.compute import Part, dense_parts, expert_parts, head_parts, seconds
from moe_train.plan.cost.links import Sent, point_to_point
from moe_train.plan.cost.timing import LayerTime, StepTime, layer_time
from moe_train.plan.layouts.batch import microbatches_per_step
from moe_train.plan.layouts.layout import Layout
from moe_train.plan.memory.stages import stage_memory
from moe_train.plan.quantities.shapes import Assumptions, Shapes, shapes
from moe_train.plan.schedule.work import Ends, Piece, PipedWork, Place, SpanWork


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
        attention = seconds([part for name, part in named.items() if name not in alone])
        traffic = layer_traffic(config, layout, z)
        self.forward: list[Piece] = []
        self.backward: list[Piece] = []
        if layout.tensor > 1:
            self._both("gather", _share(traffic.tensor_forward, 1 / 2),
                       _share(traffic.tensor_backward, 2 / 3))  # fmt: skip
        self._both("attention", (attention, 0.0), (2 * attention, 0.0))
        if layout.tensor > 1:
            self._both("scatter", _share(traffic.tensor_forward, 1 / 2),
                       _share(traffic.tensor_backward, 1 / 3))  # fmt: skip
        for name in alone:
            if name in named:
                self._both(name, (named[name].seconds, 0.0), (2 * named[name].seconds, 0.0))
        self.backward.reverse()
        out = _outward(config, layout, z)
        sent = traffic.expert_forward.intra + traffic.expert_forward.inter
        self.dispatch = Piece("dispatch", layer.exchange * out, sent * out)
        self.combine = Piece("combine", layer.exchange * (1 - out), sent * (1 - out))
        self.experts = layer.experts

    def _both(self, op: str, forward: tuple[float, float], backward: tuple[float, float]) -> None:
        self.forward.append(Piece(op, *forward))
        self.backward.append(Piece(op, *backward))

    def whole(self, layer: int, *, again: bool = False) -> list[Piece]:
        """The forward pass of `layer`, exchange and experts included."""
        pieces = [*self.forward, self.dispatch, Piece("experts", self.experts), self.combine]
        return [_at(piece, layer, again) for piece in pieces]

    def whole_back(self, layer: int, *, recomputed: bool) -> list[Piece]:
        """The backward pass of `layer`."""
        pieces = [self.combine, Piece("experts", 2 * self.experts), self.dispatch, *self.backward]
        first = self.whole(layer, again=True) if recomputed else []
        return first + [_at(piece, layer, False) for piece in pieces]


def _at(piece: Piece, layer: int, again: bool) -> Piece:
    return Piece(piece.op, piece.seconds, piece.bytes, layer, again)


def _share(sent: Sent, share: float) -> tuple[float, float]:
    return sent.seconds * share, (sent.intra + sent.inter) * share


def _outward(config: Config, layout: Layout, z: Shapes) -> float:
    """Dispatch's share of an exchange: rows with 4 bytes of probability, back without."""
    if config.parallel.dispatcher == "allgather" and not layout.span:
        return 0.5
    row = z.H * z.b
    return (row + 4) / (2 * row + 4)


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
    head = seconds(head_parts(config, z))
    ends = _ends(config, layout, vocab, assumptions, z, time)
    whole = frozenset(parse_layers(config.recompute.layers, config.model.layers))
    if layout.span:
        return _span_work(config, layout, z, pieces, head, ends, whole)
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
                ahead.append(Piece("head", head))
                back.insert(0, Piece("head", 2 * head))
            forward[stage, chunk], backward[stage, chunk] = tuple(ahead), tuple(back)
    return PipedWork(
        layout.pipeline, layout.virtual_pipeline, time.microbatches, forward, backward, ends
    )


def _span_work(
    config: Config, layout: Layout, z: Shapes, pieces: LayerPieces, head: float, ends: Ends,
    whole: frozenset[int],
) -> SpanWork:  # fmt: skip
    stages = layout.pipeline
    served = [
        seconds(_served(config, z, active, stages)) if active else 0.0
        for active in range(stages + 1)
    ]
    passes = 3 if "moe" in config.recompute.modules else 2
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
        exchange=(pieces.dispatch, pieces.combine),
        experts_forward=tuple(served),
        experts_backward=tuple(passes * each for each in served),
        head=(Piece("head", head), Piece("head", 2 * head)),
        ends=ends,
        delay=int(config.parallel.overlap_expert_comm),
    )


def _served(config: Config, z: Shapes, active: int, stages: int) -> list[Part]:
    """A rank's experts while `active` stages send it their tokens."""
    return expert_parts(config, z, active / stages, active)


def _ends(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions, z: Shapes, time: StepTime
) -> Ends:
    stages, block = layout.pipeline, layout.world // layout.pipeline
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
