"""In which order a pipeline stage runs its micro-batches: GPipe, 1F1B, interleaved 1F1B.

The spanning schedule has no order per stage but one of half-ticks for all:
`moe_train.parallel.ticks`.
"""

from __future__ import annotations

from typing import NamedTuple

KINDS = ("gpipe", "1f1b", "interleaved", "span")
"""Every schedule that can be drawn."""

FORWARD, BACKWARD = "forward", "backward"


class Pass(NamedTuple):
    """One stage's work on one micro-batch with one model chunk, in one direction."""

    stage: int
    chunk: int
    microbatch: int
    direction: str


def stage_order(
    kind: str, stages: int, stage: int, microbatches: int, chunks: int = 1
) -> list[Pass]:
    """All passes of `stage` (0-based) in the order in which it runs them.

    gpipe        all forward, then all backward, last micro-batch first
                 (Huang et al., arXiv:1811.06965, figure 2c)
    1f1b         P - s - 1 forward, then one forward and one backward in turn
                 (Narayanan et al., arXiv:2104.04473, section 2.2.1)
    interleaved  micro-batches in groups of P through all chunks; 2 (P - s - 1) + (v - 1) P
                 forward first (the same paper, section 2.2.2; Megatron-Core's order)
    """
    if kind == "interleaved":
        table = interleaved_table(stages, microbatches, chunks)
        ahead = 2 * (stages - stage - 1) + (chunks - 1) * stages
    else:
        assert chunks == 1, f"{kind} has no model chunks"
        table = [(batch, 0) for batch in range(microbatches)]
        ahead = len(table) if kind == "gpipe" else stages - stage - 1
    forward = [Pass(stage, chunk, batch, FORWARD) for batch, chunk in table]
    backward = [Pass(stage, chunks - 1 - chunk, batch, BACKWARD) for batch, chunk in table]
    if kind == "gpipe":
        backward.reverse()
    ahead = min(ahead, len(table))
    order, rest = forward[:ahead], len(table) - ahead
    for one, other in zip(forward[ahead:], backward, strict=False):
        order += [one, other]
    return order + backward[rest:]


def interleaved_table(stages: int, microbatches: int, chunks: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) in forward order: groups of P micro-batches, chunk after chunk."""
    return [
        (batch, chunk)
        for first in range(0, microbatches, stages)
        for chunk in range(chunks)
        for batch in range(first, min(first + stages, microbatches))
    ]


def most_held(order: list[Pass]) -> int:
    """Most passes run forward and not yet backward: activations kept at once."""
    held = most = 0
    for one in order:
        held += 1 if one.direction == FORWARD else -1
        most = max(most, held)
    return most
