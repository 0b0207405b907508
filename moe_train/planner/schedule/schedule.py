"""A config's schedule, built and timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_train.config.root import Config
from moe_train.errors import ConfigError
from moe_train.features.schedules import SCHEDULES, Pipeline, PipelineSchedule, schedule_of
from moe_train.parallel.layout import Layout
from moe_train.parallel.shapes import Assumptions
from moe_train.planner.cost.timing import StepTime, step_time
from moe_train.planner.schedule.clock import Timing, run_clock
from moe_train.planner.schedule.pieces import work_of
from moe_train.planner.schedule.piped import piped_graph
from moe_train.planner.schedule.spanning import span_graph
from moe_train.planner.schedule.work import SpanWork

DETAILS = ("stage", "layer")
"""One node a pass, or one node a piece of a layer."""


@dataclass(frozen=True)
class Schedule:
    """A step of one layout: graph, times and what they are compared with."""

    kind: str
    detail: str
    layout: Layout
    graph: Any
    """networkx.DiGraph, its nodes timed."""
    timing: Timing
    held: tuple[int, ...]
    """Micro-batches (chunks, when interleaved) that each stage keeps at most."""
    formula: float | None
    """The bubble's closed form for uniform stages; None where there is none."""
    predicted: StepTime
    """The planner's closed form of the same step."""

    @property
    def microbatches(self) -> int:
        """Per replica and step."""
        return self.predicted.microbatches


def choose_schedule(layout: Layout, name: str) -> PipelineSchedule:
    """The schedule that `layout` runs with (``auto``), or the one called `name` if it can.

    Raises:
        ConfigError: the layout cannot run in that order.
    """
    own = schedule_of("auto", chunks=layout.virtual_pipeline, span=layout.span)
    chosen = own if name == "auto" else SCHEDULES.get(name)
    if chosen is None:
        known = ", ".join(SCHEDULES)
        raise ConfigError("--kind", f"{name!r} is no schedule", f"one of: auto, {known}")
    if not chosen.fits(chunks=layout.virtual_pipeline, span=layout.span):
        raise ConfigError(
            "--kind", f"{name} does not go with {layout.tag}, which runs {own.name}", chosen.needs
        )
    return chosen


def build_schedule(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions, kind: str = "auto",
    detail: str = "stage",
) -> Schedule:  # fmt: skip
    """Graph and times of one step of a legal plan.

    Raises:
        ConfigError: the layout cannot run in that order.
    """
    schedule = choose_schedule(layout, config.parallel.schedule if kind == "auto" else kind)
    predicted = step_time(config, layout, vocab, assumptions)
    work = work_of(config, layout, vocab, assumptions, predicted)
    sizes = Pipeline(layout.pipeline, predicted.microbatches, layout.virtual_pipeline)
    # How much exchange is waited for differs from tick to tick where slots take turns.
    formula: float | None = predicted.bubble
    if isinstance(work, SpanWork):
        graph = span_graph(work, detail)
        sizes = sizes._replace(delay=work.delay)
        formula = None if work.delay else formula
    else:
        graph = piped_graph(work, schedule.name, detail)
    held = tuple(schedule.in_flight(sizes, stage) for stage in range(layout.pipeline))
    return Schedule(
        schedule.name, detail, layout, graph, run_clock(graph), held, formula, predicted
    )
