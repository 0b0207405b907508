"""`build_schedule`: the graph of a plan's optimizer step, timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_train.errors import ConfigError
from moe_train.features.schedules import SCHEDULES, PipelineSchedule, schedule_of
from moe_train.parallel.layout import Layout
from moe_train.planner.cost.timing import StepTime, step_time
from moe_train.planner.plan import Plan
from moe_train.planner.schedule.graph import Timing, time_graph
from moe_train.planner.schedule.piped import piped_graph
from moe_train.planner.schedule.spanning import span_graph
from moe_train.planner.schedule.work import SpanWork, work_of

DETAILS = ("stage", "layer")
"""One node a pass, or one node a piece of a layer."""


@dataclass(frozen=True)
class Schedule:
    """A step of one layout: its graph, and its times beside the closed forms."""

    kind: str
    detail: str
    layout: Layout
    graph: Any
    """networkx.DiGraph, its nodes timed."""
    timing: Timing
    held: tuple[int, ...]
    """Most micro-batches (chunks, when interleaved) in flight on each stage."""
    predicted: StepTime
    """The planner's closed form of the same step, of which the bubble is quoted."""

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
        raise ConfigError("--kind", f"{name!r} is not a schedule", f"one of: auto, {known}")
    if not chosen.fits(chunks=layout.virtual_pipeline, span=layout.span):
        raise ConfigError(
            "--kind", f"{layout.tag} cannot run {name}: its schedule is {own.name}", chosen.needs
        )
    return chosen


def build_schedule(plan: Plan, kind: str = "auto", detail: str = "stage") -> Schedule:
    """Graph and times of one step of a legal plan.

    Raises:
        ConfigError: the layout cannot run in that order.
    """
    schedule = choose_schedule(
        plan.layout, plan.config.parallel.schedule if kind == "auto" else kind
    )
    predicted = step_time(plan)
    work = work_of(plan, predicted)
    if isinstance(work, SpanWork):
        graph = span_graph(work, detail)
    else:
        graph = piped_graph(work, schedule.name, detail)
    held = tuple(schedule.in_flight(plan.pipeline, stage) for stage in range(plan.layout.pipeline))
    timing = time_graph(graph)
    return Schedule(schedule.name, detail, plan.layout, graph, timing, held, predicted)
