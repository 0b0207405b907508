"""The tick-aligned 1F1B schedule of ``placement=span``: who runs what, when.

At tick t, stage s runs the forward pass of micro-batch t - s, then the backward pass of
micro-batch t - 2(P - 1) + s, where these exist. A half-tick in which no stage has work is left
out by everybody, so P stages and M micro-batches make M + P - 1 forward and M + P - 1 backward
halves, as in 1F1B.

On the last stage both halves of a tick are the same micro-batch's, so the backward half has to wait
for the forward half. With `delay` 1 every backward pass comes one tick later: then the two halves
of a tick never depend on each other and one's computing can hide the other's exchange, for one more
micro-batch held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """One tick: stage -> micro-batch of each half (empty: the half is left out)."""

    number: int
    forward: Mapping[int, int]
    backward: Mapping[int, int]


def ticks(
    stages: int, microbatches: int, *, forward_only: bool = False, delay: int = 0
) -> Iterator[Tick]:
    """All ticks of one flush, in order; the same sequence on every rank."""
    last = microbatches - 1 + (stages - 1 if forward_only else 2 * (stages - 1) + delay)
    for number in range(last + 1):
        forward = _active(microbatches, {s: number - s for s in range(stages)})
        backward: dict[int, int] = {}
        if not forward_only:
            offset = number - 2 * (stages - 1) - delay
            backward = _active(microbatches, {s: offset + s for s in range(stages)})
        if forward or backward:
            yield Tick(number, forward, backward)


def in_flight(stages: int, stage: int, microbatches: int, delay: int = 0) -> int:
    """Most micro-batches whose activations ``stage`` holds at once: 2(P - 1 - s) + 1 + delay."""
    return min(microbatches, 2 * (stages - 1 - stage) + 1 + delay)


def _active(microbatches: int, wanted: Mapping[int, int]) -> dict[int, int]:
    return {stage: batch for stage, batch in wanted.items() if 0 <= batch < microbatches}
