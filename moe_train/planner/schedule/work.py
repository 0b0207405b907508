"""What a schedule is made of: pieces of work with their seconds and bytes, per stage.

The pieces come from a config (`moe_train.planner.schedule.pieces`) or from anything else that can
say how long a pass takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COMPUTE = ("attention", "router", "shared expert", "experts", "embedding", "head")
TENSOR = ("gather", "scatter")
EXCHANGE = ("dispatch", "combine")


@dataclass(frozen=True)
class Piece:
    """A part of a pass that runs without interruption."""

    op: str
    """One of COMPUTE, TENSOR, EXCHANGE, or send, gradients, optimizer."""
    seconds: float
    bytes: float = 0.0
    """Sent by each rank; 0 for compute."""
    layer: int = 0
    """1-based; 0 where it belongs to none."""
    again: bool = False
    """Whether it is a recomputation in the backward pass."""


@dataclass(frozen=True)
class Place:
    """Who a stage is, in words that a graph file can hold."""

    ranks: str
    """Ranks of the stage, e.g. ``0-1``; of all replicas."""
    layers: tuple[str, ...]
    """1-based layers by model chunk."""
    experts: str
    """0-based experts of a layer that live on the stage's ranks."""


@dataclass(frozen=True)
class Ends:
    """What happens around the passes, per stage."""

    messages: tuple[Piece, ...]
    """Entry s: from stage s to the next one, or back (the last entry closes the ring)."""
    kept: tuple[float, ...]
    """Bytes of activations that a stage keeps of one micro-batch (and chunk)."""
    gradients: Piece
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


@dataclass(frozen=True)
class SpanWork:
    """Half-ticks of ``placement=span``: dense pieces of the active stages around the exchange."""

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
    """1 where a tick's halves take turns and hide each other's exchange, see
    `moe_train.features.schedules.ticks`."""


def total(pieces: tuple[Piece, ...] | list[Piece]) -> float:
    """Seconds of pieces that run one after the other."""
    return sum(piece.seconds for piece in pieces)
