"""Peak memory of every pipeline stage: state, activations in flight, and the moment of the peak.

All ranks of a stage hold the same amount (with even routing; imbalance is explicit), so a stage
stands for its ranks. The walk follows a stage's busiest micro-batch: its forward pass ends while
`held` micro-batches are kept; then the loss, and layer by layer the backward pass, which frees
what it has used. The optimizer's update comes last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moe_train.config.root import Config
from moe_train.features.schedules import Pipeline, schedule_of, span_rows_in_flight
from moe_train.parallel.batch import microbatches_per_step
from moe_train.parallel.layout import Layout
from moe_train.parallel.optimizer_state import StateBytes, state_bytes
from moe_train.parallel.parameters import rank_parameters
from moe_train.parallel.shapes import Assumptions, Shapes, shapes
from moe_train.planner.memory.activations import embedding_terms, head_terms
from moe_train.planner.memory.layers import (
    forward_buffers,
    hosted_terms,
    kept_terms,
    layer_backward,
    loss_phases,
    recomputed_terms,
    retained_terms,
    span_backward,
    span_forward_buffers,
    standing_buffers,
)
from moe_train.planner.memory.update import update_terms
from moe_train.planner.terms import Term, total

GB = 1e9


class Moment(NamedTuple):
    """A point of the step: its name, bytes kept for backward, and the buffers on top."""

    name: str
    kept: float
    buffers: tuple[Term, ...]

    @property
    def bytes(self) -> float:
        """Bytes beside weights, gradients and optimizer state."""
        return self.kept + total(self.buffers)


@dataclass(frozen=True)
class StageMemory:
    """Peak bytes on each rank of one pipeline stage."""

    stage: int
    held: int
    """Micro-batches (chunks of them, when interleaved) kept at once."""
    state: StateBytes
    one_microbatch: float
    """Bytes kept of one micro-batch by the whole stage (by one chunk, when interleaved)."""
    hosted: float
    """Bytes that the experts of ``placement=span`` keep for all stages."""
    peak: Moment
    moments: tuple[Moment, ...]
    fragmentation: float
    reserved: float

    @property
    def activations(self) -> float:
        """Everything that comes and goes, at the peak."""
        return self.peak.bytes

    @property
    def total(self) -> float:
        """Bytes of device memory at the peak, allowances included."""
        return self.allocated + self.fragmentation + self.reserved

    @property
    def allocated(self) -> float:
        """Bytes of tensors at the peak, without allowances."""
        return self.state.device + self.activations

    @property
    def without_optimizer(self) -> float:
        """Weights, gradients and activations alone."""
        return self.allocated - self.state.optimizer


def stage_memory(
    config: Config, layout: Layout, vocab: int, stage: int, assumptions: Assumptions
) -> StageMemory:
    """Peak memory of the ranks of pipeline stage `stage` (0-based) of a legal plan."""
    z = shapes(config, layout, vocab, assumptions)
    rank = layout.stage_ranks(stage)[0]
    parameters = rank_parameters(config.model, layout, rank, vocab)
    state = state_bytes(config, layout, parameters)
    count = microbatches_per_step(config, layout.data)
    delay = int(config.parallel.overlap_expert_comm and layout.span)
    sizes = Pipeline(layout.pipeline, count, layout.virtual_pipeline, delay)
    schedule = schedule_of(config.parallel.schedule, chunks=sizes.chunks, span=layout.span)
    held = schedule.in_flight(sizes, stage)
    modules = config.recompute.modules
    whole = config.recomputed_layers
    layers = layout.stage_layers(stage)
    kept = [total(kept_terms(z, recomputed=n in whole, modules=modules, span=layout.span))
            for n in layers]  # fmt: skip
    first, last = stage == 0, stage == layout.pipeline - 1
    ends = total(embedding_terms(z)) * first / layout.virtual_pipeline
    one = sum(kept) / layout.virtual_pipeline + ends
    hosted = 0.0
    if layout.span:
        rows = span_rows_in_flight(sizes)
        hosted = rows * len(layers) * total(hosted_terms(z, modules))
    floor = held * one + hosted
    update = update_terms(config, layout, parameters, fused=assumptions.fused)
    moments = (
        *_moments(z, config, layout, layers, kept, floor, whole, last=last),
        Moment("optimizer update", 0.0, update),
    )
    peak = max(moments, key=lambda moment: moment.bytes)
    return StageMemory(
        stage=stage,
        held=held,
        state=state,
        one_microbatch=one,
        hosted=hosted,
        peak=peak,
        moments=moments,
        fragmentation=peak.bytes * assumptions.fragmentation,
        reserved=config.hardware.reserved_gb * GB,
    )


def _moments(
    z: Shapes,
    config: Config,
    layout: Layout,
    layers: list[int],
    kept: list[float],
    floor: float,
    whole: frozenset[int],
    *,
    last: bool,
) -> list[Moment]:
    always = [
        *([Term("pipeline messages", 2 * z.N * z.H * z.b, "2 N H b", "P2P")]
          if layout.pipeline > 1 else []),
        *standing_buffers(z),
    ]  # fmt: skip
    buffers = span_forward_buffers(z) if layout.span else forward_buffers(z)
    found = [Moment("end of the forward pass", floor, (*buffers, *always))]
    if last:
        head = total(head_terms(z))
        found += [
            Moment(phase.name, floor + head, (*phase.terms, *always)) for phase in loss_phases(z)
        ]
    chunk = len(layers) // layout.virtual_pipeline
    freed, done = 0.0, 0
    modules = config.recompute.modules
    # The last chunk goes backward first; its layers free what they kept one after the other.
    for number, size in reversed(list(zip(layers, kept, strict=True))[-chunk:]):
        recomputed = number in whole
        again = recomputed_terms(z, recomputed=recomputed, modules=modules, span=layout.span)
        saved = [term.name for term in again]
        saved += [term.name for term in kept_terms(z, recomputed=recomputed, modules=modules,
                                                   span=layout.span)]  # fmt: skip
        if layout.span:
            saved += [term.name for term in hosted_terms(z, modules)]
        before = retained_terms(z, done)
        for phase in span_backward(z, saved) if layout.span else layer_backward(z, saved):
            terms = (*again, *phase.terms, *before, *always)
            found.append(Moment(f"backward of layer {number}{phase.name}", floor - freed, terms))
        freed += size
        done += recomputed and not layout.span
    return found


def plan_memory(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions
) -> list[StageMemory]:
    """Peak memory of every stage of a legal plan."""
    return [
        stage_memory(config, layout, vocab, stage, assumptions) for stage in range(layout.pipeline)
    ]


def worst(stages: list[StageMemory]) -> StageMemory:
    """The stage that needs most."""
    return max(stages, key=lambda one: one.total)
