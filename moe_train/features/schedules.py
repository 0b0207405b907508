"""Pipeline schedules: 1F1B, interleaved 1F1B, GPipe and the tick-aligned schedule of span.

One descriptor each: in which order a stage runs its passes, how many micro-batches it holds,
which share of a step it waits, and what runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

FORWARD, BACKWARD = "forward", "backward"


class Pipeline(NamedTuple):
    """Sizes that a schedule depends on."""

    stages: int
    """P"""
    microbatches: int
    """M, of a replica and optimizer step."""
    chunks: int = 1
    """v, model chunks of a stage (parallel.virtual_pipeline)."""
    delay: int = 0
    """Passes (under span: ticks, see `ticks`) by which backward passes come later, so that a
    forward and a backward pass that run side by side never depend on each other: 1 where the
    expert exchange overlaps (``parallel.overlap_expert_comm``), else 0."""


class Pass(NamedTuple):
    """One stage's work on one micro-batch with one model chunk, in one direction."""

    stage: int
    chunk: int
    microbatch: int
    direction: str


@dataclass(frozen=True)
class PipelineSchedule:
    """One pipeline schedule."""

    name: str
    title: str
    in_flight: Callable[[Pipeline, int], int]
    """Most micro-batches (chunks, when interleaved) whose activations a stage (0-based) holds."""
    order: Callable[[Pipeline, int], list[Pass]] | None = None
    """All passes of a stage, in the order in which it runs them; None where stages run in ticks."""
    chunks: bool = False
    """Whether it is for several model chunks a stage, or for one."""
    span: bool = False
    """Whether it is for placement=span, or for placement=stage."""
    run: str = ""
    """``module:class`` of the runtime; empty where Megatron's get_forward_backward_func has it."""

    def fits(self, *, chunks: int, span: bool) -> bool:
        """Whether a layout with these model chunks a stage and this placement can use it."""
        return (self.chunks, self.span) == (chunks > 1, span)

    @property
    def needs(self) -> str:
        """The settings that it goes with."""
        if self.span:
            return "parallel.placement=span with EP = TP x PP"
        chunks = 2 if self.chunks else 1
        return f"parallel.virtual_pipeline={chunks} and parallel.placement=stage"


def _order(pipeline: Pipeline, stage: int, table: list[tuple[int, int]], ahead: int) -> list[Pass]:
    """`ahead` forward passes, then one forward and one backward in turn, then the rest."""
    last = pipeline.chunks - 1
    forward = [Pass(stage, chunk, batch, FORWARD) for batch, chunk in table]
    backward = [Pass(stage, last - chunk, batch, BACKWARD) for batch, chunk in table]
    ahead = min(ahead, len(table))
    order = forward[:ahead]
    for both in zip(forward[ahead:], backward, strict=False):
        order += both
    return order + backward[len(table) - ahead :]


def _1f1b(pipeline: Pipeline, stage: int) -> list[Pass]:
    table = [(batch, 0) for batch in range(pipeline.microbatches)]
    return _order(pipeline, stage, table, pipeline.stages - stage - 1 + pipeline.delay)


def interleaved_table(pipeline: Pipeline) -> list[tuple[int, int]]:
    """(micro-batch, chunk) in forward order: groups of P micro-batches, chunk after chunk."""
    stages, microbatches = pipeline.stages, pipeline.microbatches
    return [
        (batch, chunk)
        for first in range(0, microbatches, stages)
        for chunk in range(pipeline.chunks)
        for batch in range(first, min(first + stages, microbatches))
    ]


def _interleaved_ahead(pipeline: Pipeline, stage: int) -> int:
    between = 2 * (pipeline.stages - stage - 1)
    return between + (pipeline.chunks - 1) * pipeline.stages + pipeline.delay


def _interleaved(pipeline: Pipeline, stage: int) -> list[Pass]:
    table = interleaved_table(pipeline)
    return _order(pipeline, stage, table, _interleaved_ahead(pipeline, stage))


def _gpipe(pipeline: Pipeline, stage: int) -> list[Pass]:
    table = [(batch, 0) for batch in range(pipeline.microbatches)]
    return _order(pipeline, stage, table, len(table))


SCHEDULES = {
    one.name: one
    for one in (
        # Narayanan et al., arXiv:2104.04473, section 2.2.1. With a delay, Megatron-Core's combined
        # 1F1B, which it has for one stage (combined_1f1b_schedule_for_no_pipelining): the forward
        # pass of the next micro-batch runs beside each backward pass.
        PipelineSchedule(
            name="1f1b",
            title="1F1B",
            order=_1f1b,
            in_flight=lambda p, stage: min(p.stages - stage + p.delay, p.microbatches),
        ),
        # The same paper, section 2.2.2, in Megatron-Core's order. A delay is one more forward pass
        # before the first backward pass (get_pp_rank_microbatches).
        PipelineSchedule(
            name="interleaved",
            title="interleaved 1F1B",
            order=_interleaved,
            in_flight=lambda p, stage: min(
                _interleaved_ahead(p, stage) + 1, p.microbatches * p.chunks
            ),
            chunks=True,
        ),
        # Huang et al., arXiv:1811.06965, section 2.3; here the first micro-batch goes back first.
        PipelineSchedule(
            name="gpipe",
            title="GPipe",
            order=_gpipe,
            in_flight=lambda p, _: p.microbatches,
            run="moe_train.train.gpipe:GPipeSchedule",
        ),
        PipelineSchedule(
            name="span",
            title="tick-aligned spanning 1F1B",
            in_flight=lambda p, stage: min(
                p.microbatches, 2 * (p.stages - 1 - stage) + 1 + p.delay
            ),
            span=True,
            run="moe_train.model.span.schedule:SpanSchedule",
        ),
    )
}


def schedule_of(name: str, *, chunks: int, span: bool) -> PipelineSchedule:
    """The schedule called `name`; ``auto`` is the first that goes with chunks and placement."""
    if name != "auto":
        return SCHEDULES[name]
    return next(one for one in SCHEDULES.values() if one.fits(chunks=chunks, span=span))


def most_held(order: list[Pass]) -> int:
    """Most passes run forward and not yet backward: activations kept at once."""
    held = most = 0
    for one in order:
        held += 1 if one.direction == FORWARD else -1
        most = max(most, held)
    return most


def bubble(stages: int, microbatches: int, chunks: int = 1) -> float:
    """Share of the pipeline's time in which a stage waits, (P - 1) / (v M + P - 1), stages uniform.

    For GPipe, 1F1B and, with v > 1, interleaved 1F1B. Source: Narayanan et al., arXiv:2104.04473,
    section 2.2, whose bubble time over ideal time (P - 1) / (v M) is here taken over all the time.
    Of a plan's own, uneven stages: `moe_train.planner.cost.pipeline.PipelineTime`.
    """
    return (stages - 1) / (chunks * microbatches + stages - 1)


@dataclass(frozen=True)
class Tick:
    """One tick of span: stage -> micro-batch of each slot (empty: the slot is left out)."""

    number: int
    forward: Mapping[int, int]
    backward: Mapping[int, int]


def ticks(
    stages: int, microbatches: int, *, forward_only: bool = False, delay: int = 0
) -> Iterator[Tick]:
    """All ticks of one flush of the tick-aligned schedule, the same sequence on every rank.

    At tick t, stage s runs the forward pass of micro-batch t - s, then the backward pass of
    micro-batch t - 2(P - 1) + s, where these exist. A slot in which no stage has work is left
    out by every rank, so there are M + P - 1 forward and M + P - 1 backward slots, as in 1F1B.

    On the last stage both slots of a tick are the same micro-batch's, so the backward slot has to
    wait for the forward slot. With a delay of 1 every backward pass comes one tick later: then the
    two slots of a tick never depend on each other and one's computing can hide the other's
    exchange, for one more micro-batch held.
    """
    lag = 2 * (stages - 1) + delay
    for number in range(microbatches + (stages - 1 if forward_only else lag)):
        ahead = {stage: number - stage for stage in range(stages)}
        back = {stage: number - lag + stage for stage in range(stages)}
        forward = {stage: one for stage, one in ahead.items() if 0 <= one < microbatches}
        backward = {stage: one for stage, one in back.items() if 0 <= one < microbatches}
        if forward_only:
            backward = {}
        if forward or backward:
            yield Tick(number, forward, backward)


def span_rows_in_flight(pipeline: Pipeline) -> float:
    """Micro-batches of routed rows that every rank keeps per local layer under span.

    A rank receives 1 / P of a stage's rows, from each of the P stages.
    """
    held = SCHEDULES["span"].in_flight
    return sum(held(pipeline, stage) for stage in range(pipeline.stages)) / pipeline.stages
