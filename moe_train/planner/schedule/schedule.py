"""A config's schedule, built and timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_train.config.root import Config
from moe_train.errors import ConfigError
from moe_train.parallel.layout import Layout
from moe_train.parallel.orders import KINDS, most_held, stage_order
from moe_train.parallel.shapes import Assumptions
from moe_train.parallel.ticks import in_flight
from moe_train.planner.cost.timing import StepTime, step_time
from moe_train.planner.schedule.clock import Timing, run_clock
from moe_train.planner.schedule.pieces import work_of
from moe_train.planner.schedule.piped import piped_graph
from moe_train.planner.schedule.spanning import span_graph
from moe_train.planner.schedule.work import PipedWork, SpanWork

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


def choose_kind(layout: Layout, asked: str) -> str:
    """The schedule that `layout` runs with, or the one `asked` for if it can.

    Raises:
        ConfigError: the layout cannot run in that order.
    """
    chunks = layout.virtual_pipeline
    own = "span" if layout.span else "interleaved" if chunks > 1 else "1f1b"
    if asked in ("auto", own):
        return own
    if asked not in KINDS:
        raise ConfigError(
            "--kind", f"{asked!r} is no schedule", f"one of: auto, {', '.join(KINDS)}"
        )
    if asked == "gpipe" and own == "1f1b":
        return asked
    fix = {
        "span": "parallel.placement=span with EP = TP x PP",
        "interleaved": "parallel.virtual_pipeline=2 and parallel.placement=stage",
    }.get(asked, "parallel.virtual_pipeline=1 and parallel.placement=stage")
    raise ConfigError("--kind", f"{asked} does not go with {layout.tag}, which runs {own}", fix)


def build_schedule(
    config: Config, layout: Layout, vocab: int, assumptions: Assumptions, kind: str = "auto",
    detail: str = "stage",
) -> Schedule:  # fmt: skip
    """Graph and times of one step of a legal plan.

    Raises:
        ConfigError: the layout cannot run in that order.
    """
    kind = choose_kind(layout, kind)
    predicted = step_time(config, layout, vocab, assumptions)
    work = work_of(config, layout, vocab, assumptions, predicted)
    stages, count = layout.pipeline, predicted.microbatches
    formula: float | None
    if isinstance(work, SpanWork):
        graph = span_graph(work, detail)
        held = tuple(in_flight(stages, stage, count, work.delay) for stage in range(stages))
        # How much exchange is waited for differs from tick to tick where halves take turns.
        formula = None if work.delay else predicted.bubble
    else:
        assert isinstance(work, PipedWork)
        graph = piped_graph(work, kind, detail)
        orders = (stage_order(kind, stages, s, count, work.chunks) for s in range(stages))
        held = tuple(most_held(order) for order in orders)
        formula = predicted.bubble
    return Schedule(kind, detail, layout, graph, run_clock(graph), held, formula, predicted)
