"""`Plan`: a resolved run under assumptions, from which memory, time and traffic are computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from moe_train.config.kernels import TE, expected_kernels_on
from moe_train.config.root import Config
from moe_train.features.schedules import Pipeline, PipelineSchedule, schedule_of
from moe_train.parallel.parameters import RankParameters, rank_parameters
from moe_train.parallel.resolved import ResolvedRun
from moe_train.parallel.shapes import Assumptions, Shapes, shapes

BAND = 0.15
"""Relative error of a predicted step time; plans whose times differ by less count as equal."""


FRAGMENTATION = 0.02
"""Share of all tensors that the allocator wastes: assumed. Published runs bound it from above: with
more, the fullest of them (benchmarks/published) would not fit the GPUs on which it ran."""
MEMORY_IMBALANCE = 1.3
"""Rows of an accelerator's busiest experts over the average that memory has to hold: assumed.
Auxiliary losses keep routing near to even, but one layer of one step need not be."""


def assumptions_of(
    config: Config,
    imbalance: float = 1.0,
    fragmentation: float = FRAGMENTATION,
    memory_imbalance: float | None = None,
) -> Assumptions:
    """Assumptions for the kernels that `config` would run with on its hardware profile.

    Args:
        memory_imbalance: see `Assumptions`; None is MEMORY_IMBALANCE on an accelerator, unless
            ``model.router.force_balance`` makes routing even, and nothing more than `imbalance`
            on a CPU, whose ranks share their memory.
    """
    chosen = expected_kernels_on(config.backend.kernels, config.hardware).kernels
    if memory_imbalance is None:
        uneven = config.hardware.kind == "accelerator" and not config.model.router.force_balance
        memory_imbalance = MEMORY_IMBALANCE if uneven else 1.0
    return Assumptions(imbalance, fragmentation, chosen is TE, memory_imbalance)


@dataclass(frozen=True)
class Plan(ResolvedRun):
    """A resolved run, or one that a search considers, and what a plan assumes about it."""

    vocab_source: str = ""
    assumptions: Assumptions = Assumptions()

    @classmethod
    def of(cls, run: ResolvedRun, assumptions: Assumptions | None = None) -> Self:
        """The plan of `run`; by default under the assumptions of `assumptions_of`."""
        return cls(
            run.config,
            run.layout,
            run.vocab,
            run.vocab_source,
            run.notes,
            assumptions or assumptions_of(run.config),
        )

    def under(self, config: Config) -> Self:
        """The same layout, vocabulary and assumptions under another config."""
        return replace(self, config=config)

    @cached_property
    def shapes(self) -> Shapes:
        """Sizes of one micro-batch on one rank."""
        return shapes(self.config, self.layout, self.vocab, self.assumptions)

    @cached_property
    def memory_shapes(self) -> Shapes:
        """The same with as many routed rows as memory has to hold."""
        taken = self.assumptions.for_memory()
        return shapes(self.config, self.layout, self.vocab, taken)

    @cached_property
    def _dense_shapes(self) -> Shapes:
        return self.memory_shapes.dense(self.config.model.dense_hidden)

    def layer_shapes(self, number: int) -> Shapes:
        """`memory_shapes` in layer `number` (1-based), which is dense or has experts."""
        dense = number <= self.config.model.dense_layers
        return self._dense_shapes if dense else self.memory_shapes

    def parameters(self, stage: int) -> RankParameters:
        """Parameters on each rank of pipeline stage `stage` (0-based): all have as many."""
        rank = self.layout.stage_ranks(stage)[0]
        return rank_parameters(self.config.model, self.layout, rank, self.vocab)

    @property
    def pipeline(self) -> Pipeline:
        """Sizes that a pipeline schedule depends on."""
        layout = self.layout
        return Pipeline(layout.pipeline, self.microbatches, layout.virtual_pipeline, self.delay)

    @property
    def schedule(self) -> PipelineSchedule:
        """The run's pipeline schedule."""
        layout, name = self.layout, self.config.parallel.schedule
        return schedule_of(name, chunks=layout.virtual_pipeline, span=layout.span)

    @property
    def delay(self) -> int:
        """Passes, or ticks under span, by which overlapped exchanges delay backward passes."""
        return int(self.config.parallel.overlap_expert_comm)

    @property
    def combined(self) -> bool:
        """Whether it runs Megatron's combined 1F1B, a forward beside a backward pass."""
        return self.config.parallel.overlap_expert_comm and not self.layout.span

    @property
    def device_bytes(self) -> float:
        """Memory of one device."""
        return self.config.hardware.memory_gb * 1e9
