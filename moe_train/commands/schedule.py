"""``moe-train schedule``: the optimizer step as a graph: times, figure, trace."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.commands.common import check_imbalance, console_for, plan_world, write_text
from moe_train.errors import EXIT_FINISHED, ConfigError
from moe_train.features.schedules import SCHEDULES

if TYPE_CHECKING:
    from moe_train.planner.schedule.schedule import Schedule

VERSION = 2
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
    args = _parser().parse_intermixed_args(argv)
    from moe_train.config.compose import collect
    from moe_train.planner.plan import Plan, assumptions_of
    from moe_train.planner.resolution import resolve_run
    from moe_train.planner.schedule.schedule import build_schedule

    config, faults = collect(args.overrides)
    world = plan_world(args.world, None if faults else config)
    check_imbalance(args.imbalance)
    if args.beside and not args.trace:
        raise ConfigError("--beside", "needs --trace", "add --trace FILE")
    run = resolve_run(args.overrides, world, composed=(config, faults))
    plan = Plan.of(run, assumptions_of(run.config, args.imbalance))
    schedule = build_schedule(plan, args.kind, args.detail)
    report = schedule_report(schedule)
    cores = run.config.hardware.cores
    _show(schedule, report, console_for(args.json), cores if cores < world else 0)
    _write(args, schedule, report)
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
        ("json", "write times and bounds there; - is stdout"),
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
        "bubble": schedule.predicted.bubble,
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
        "stage", "busy s", "waiting s", "waiting", "in flight",
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
    console.print(
        f"Step {report['step_seconds']:.4f} s by longest path (the plan's formula: "
        f"{report['planner_step_seconds']:.4f} s), pipeline {report['pipeline_seconds']:.4f} s, "
        f"bubble {100 * report['bubble']:.1f} %"
    )
    if shared:
        console.print(
            "The graph assumes a core for each rank; the plan's formula accounts for the "
            f"{shared} cores they share."
        )
    console.print(
        f"Bounds: busiest stage {report['resource_bound_seconds']:.4f} s, "
        f"data alone {report['dependency_bound_seconds']:.4f} s"
    )


def _measured(path: Path, schedule: Schedule) -> list[dict[str, Any]]:
    """A run's events, to show beside the predicted ones; prints how long its step took.

    Raises:
        ConfigError: it is not a trace, or one of another layout.
    """
    from moe_train.planner.schedule.trace import measured_beside
    from moe_train.run_folder.trace_events import duration, read_trace

    events, facts = read_trace("--beside", path)
    layout = schedule.layout.tag
    if facts.get("layout", layout) != layout:
        raise ConfigError(
            "--beside",
            f"{path} was measured in layout {facts['layout']}, this schedule is of {layout}",
            "give the run's own overrides",
        )
    measured, predicted = duration(events), schedule.timing.step
    print(
        f"Measured: {measured:.4f} s; the schedule predicts {predicted:.4f} s "
        f"({predicted / measured - 1:+.0%})"
    )
    return list(measured_beside(events))


def _write(args: argparse.Namespace, schedule: Schedule, report: dict[str, Any]) -> None:
    from moe_train.parallel.layout import ranges
    from moe_train.planner.schedule.export import draw, write_graph
    from moe_train.planner.schedule.trace import predicted_events
    from moe_train.run_folder.trace_events import trace_text

    if args.dag:
        write_graph(schedule.graph, args.dag)
        print(f"written to {args.dag}")
    if args.trace:
        layout = schedule.layout
        ranks = [ranges(list(layout.stage_ranks(stage))) for stage in range(layout.pipeline)]
        events = list(predicted_events(schedule.graph, ranks))
        if args.beside:
            events += _measured(args.beside, schedule)
        facts = {"kind": schedule.kind, "layout": schedule.layout.tag, "source": "predicted"}
        write_text("--trace", args.trace, trace_text(events, facts))
    if args.figure:
        draw(schedule, args.figure)
        print(f"written to {args.figure}")
    if args.json:
        write_text("--json", args.json, json.dumps(report, indent=1) + "\n")
