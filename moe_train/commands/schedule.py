"""``moe-train schedule``: the step as a graph, its times, pictures and trace; no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.commands.plan import natural_world, write_text
from moe_train.errors import EXIT_FINISHED, ConfigError
from moe_train.features.schedules import SCHEDULES

if TYPE_CHECKING:
    from moe_train.planner.schedule.schedule import Schedule

VERSION = 1
"""Raised when a key of the report changes its meaning or goes away."""

SHOWN = 16
"""Stages shown at most; the JSON has all."""

EXAMPLES = """examples:
  moe-train schedule                                 the default run on 8 ranks
  moe-train schedule experiment=moe_30b_8x64gb --figure step.svg --trace step.json
  moe-train schedule experiment=moe_30b_8x64gb --detail layer --dag step.graphml
  moe-train schedule parallel=tp2_pp4_ep2 --kind gpipe --figure gpipe.png
  moe-train schedule run.name=x --beside runs/x/trace.json --trace both.json

The suffix chooses the format: --dag .json (networkx node-link), .graphml or .dot; --figure .svg,
.png or .pdf. --trace writes the Trace Event Format, for Perfetto or chrome://tracing; a run with
train.trace=true writes the same format to runs/<name>/trace.json.
"""


def schedule_main(argv: Sequence[str]) -> int:
    """Run ``moe-train schedule``; returns the exit code.

    Raises:
        ConfigFaults: the plan is refused.
        ConfigError: an option does not go with the layout, or a file cannot be written.
    """
    asked = _parser().parse_intermixed_args(argv)
    from rich.console import Console

    from moe_train.config.compose import collect
    from moe_train.planner.memory.fit import assumptions_of
    from moe_train.planner.resolution import resolve_run
    from moe_train.planner.schedule.schedule import build_schedule

    world = asked.world
    if world is None:
        config, faults = collect(asked.overrides)
        world = natural_world(config) if not faults else 8
    if world < 1:
        raise ConfigError("--world", f"{world} is no number of ranks", "give 1 or more")
    if not 1 <= asked.imbalance < inf:
        raise ConfigError("--imbalance", f"{asked.imbalance:g} makes no sense", "give 1 or more")
    if asked.beside and not asked.trace:
        raise ConfigError("--beside", "goes into the file of --trace", "add --trace FILE")
    run = resolve_run(asked.overrides, world)
    config, layout, vocab = run.config, run.layout, run.vocab
    assumptions = assumptions_of(config, asked.imbalance)
    schedule = build_schedule(config, layout, vocab, assumptions, asked.kind, asked.detail)
    report = schedule_report(schedule)
    cores = config.hardware.cores
    _show(schedule, report, Console(), cores if cores < layout.world else 0)
    _write(asked, schedule, report)
    return EXIT_FINISHED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-train schedule",
        description="Build the optimizer step as a graph, time it and draw it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="config overrides, key=value")
    parser.add_argument("--world", type=int, help="ranks (default: what the layout needs, or 8)")
    parser.add_argument(
        "--kind",
        default="auto",
        metavar="KIND",
        help="auto (what the layout runs), or one of: " + ", ".join(SCHEDULES),
    )
    parser.add_argument(
        "--detail",
        choices=("stage", "layer"),
        default="stage",
        help="a node is a pass of a stage, or a piece of one layer",
    )
    parser.add_argument(
        "--imbalance",
        type=float,
        default=1.0,
        metavar="X",
        help="rows of the busiest rank's experts over the average (default 1)",
    )
    for name, what in (
        ("dag", "write the graph there (.json, .graphml, .dot)"),
        ("trace", "write a trace for Perfetto there"),
        ("figure", "draw the step there (.svg, .png, .pdf)"),
        ("json", "write times and bounds there"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    parser.add_argument(
        "--beside", type=Path, metavar="FILE", help="with --trace: a run's trace.json to put beside"
    )
    return parser


def schedule_report(schedule: Schedule) -> dict[str, Any]:
    """Times, bounds and sizes as one plain mapping; seconds and bytes."""
    timing, layout = schedule.timing, schedule.layout
    graph = schedule.graph
    return {
        "version": VERSION,
        "kind": schedule.kind,
        "detail": schedule.detail,
        "layout": layout.tag,
        "world": layout.world,
        "microbatches": schedule.microbatches,
        "nodes": graph.number_of_nodes(),
        "edges": graph.number_of_edges(),
        "step_seconds": timing.step,
        "pipeline_seconds": timing.pipeline,
        "planner_step_seconds": schedule.predicted.step,
        "bubble": timing.bubble,
        "bubble_of_uniform_stages": schedule.formula,
        "resource_bound_seconds": timing.resource_bound,
        "dependency_bound_seconds": timing.dependency_bound,
        "critical_path": list(timing.critical),
        "stages": [
            {
                "stage": stage,
                "busy_seconds": busy,
                "waiting_seconds": timing.pipeline - busy,
                "held": held,
            }
            for stage, (busy, held) in enumerate(zip(timing.busy, schedule.held, strict=True))
        ],
    }


def _show(schedule: Schedule, report: dict[str, Any], console: Any, shared: int) -> None:
    from moe_train.planner.report.style import table_of

    table = table_of(
        f"{report['layout']}: {report['kind']}, M={report['microbatches']}",
        "stage", "busy s", "waiting s", "waiting", "most held",
    )  # fmt: skip
    whole = schedule.timing.pipeline
    for stage in report["stages"][:SHOWN]:
        share = stage["waiting_seconds"] / whole if whole else 0.0
        table.add_row(
            str(stage["stage"]),
            f"{stage['busy_seconds']:.4f}",
            f"{stage['waiting_seconds']:.4f}",
            f"{100 * share:.1f} %",
            str(stage["held"]),
        )
    console.print(table)
    console.print(
        f"Graph: {report['nodes']:,} nodes, {report['edges']:,} edges, one node a "
        f"{'pass' if schedule.detail == 'stage' else 'piece of a layer'}"
    )
    formula = schedule.formula
    uniform = f" (uniform stages: {100 * formula:.1f} %)" if formula is not None else ""
    console.print(
        f"Step {report['step_seconds']:.4f} s by longest path (the plan's formula: "
        f"{report['planner_step_seconds']:.4f} s), pipeline {report['pipeline_seconds']:.4f} s, "
        f"bubble {100 * report['bubble']:.1f} %{uniform}"
    )
    if shared:
        console.print(
            "The graph gives every rank a core of its own; the plan's formula counts that they "
            f"share {shared}."
        )
    console.print(
        f"Bounds: busiest stage {report['resource_bound_seconds']:.4f} s, "
        f"data alone {report['dependency_bound_seconds']:.4f} s"
    )


def _measured(path: Path, schedule: Schedule) -> list[dict[str, Any]]:
    """A run's events, to lie under the predicted ones; says how long its step took.

    Raises:
        ConfigError: it is no trace, or one of another layout.
    """
    from moe_train.planner.schedule import chrome

    events, facts = chrome.read_trace("--beside", path)
    layout = schedule.layout.tag
    if facts.get("layout", layout) != layout:
        raise ConfigError(
            "--beside",
            f"{path} was measured in layout {facts['layout']}, this schedule is of {layout}",
            "give the run's own overrides",
        )
    real, guess = chrome.duration(events), schedule.timing.step
    print(f"Measured: {real:.4f} s; the schedule predicts {guess:.4f} s ({guess / real - 1:+.0%})")
    return list(chrome.measured_beside(events))


def _write(asked: argparse.Namespace, schedule: Schedule, report: dict[str, Any]) -> None:
    from moe_train.planner.schedule import chrome
    from moe_train.planner.schedule.export import write_graph
    from moe_train.planner.schedule.figure import draw

    if asked.dag:
        write_graph(schedule.graph, asked.dag)
        print(f"written to {asked.dag}")
    if asked.trace:
        block = schedule.layout.ranks_per_stage
        ranks = [
            f"{stage * block}-{(stage + 1) * block - 1}" if block > 1 else str(stage)
            for stage in range(schedule.layout.pipeline)
        ]
        events = list(chrome.predicted_events(schedule.graph, ranks))
        if asked.beside:
            events += _measured(asked.beside, schedule)
        facts = {"kind": schedule.kind, "layout": schedule.layout.tag, "source": "predicted"}
        write_text("--trace", asked.trace, chrome.trace_text(events, facts))
    if asked.figure:
        draw(schedule, asked.figure)
        print(f"written to {asked.figure}")
    if asked.json:
        write_text("--json", asked.json, json.dumps(report, indent=1) + "\n")
