"""The tables of ``moe-train tune``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from moe_train.planner.memory.stages import GB
from moe_train.planner.report.style import table_of

SHOWN = 10
"""Most lines of the frontier; ``--json`` has all."""


def print_tuning(report: dict[str, Any], console: Console) -> None:
    """Print `moe_train.planner.search.tuning.Tuning.report`."""
    band, share = report["band"], report["preferred_memory_share"]
    console.print(
        f"{report['model']} on {report['world']} x {report['hardware']}, "
        f"{report['tokens_per_step']:,} tokens a step. Predicted times are within {band:.0%}: "
        "what differs by less is equal (=)."
    )
    if report["fixed"]:
        console.print("Fixed by the overrides: " + ", ".join(report["fixed"]), highlight=False)
    if not report["fits"]:
        console.print("[bold]Nothing fits.[/bold] The smallest:")
    _print_candidates("Best layouts", report["top"], console)
    console.print(f"Preferred: at most {share:.0%} of a device's memory.")
    _print_requested(report["requested"], console)
    if report["remedies"]:
        console.print("It would fit with:")
        for line in report["remedies"]:
            console.print(f"  {line}", highlight=False, markup=False)
    if len(report["pareto"]) > 1:
        _print_frontier(report["pareto"], console)
    console.print("To paste behind the same overrides:")
    for number, row in enumerate(report["top"], start=1):
        console.print(
            f"  {number}  " + shlex.join(row["overrides"]), highlight=False, markup=False,
            soft_wrap=True,
        )  # fmt: skip


def options_text(options: dict[str, Any]) -> str:
    """The options of a candidate in a few words."""
    modules, layers = options["recompute.modules"], options["recompute.layers"]
    parts = [f"micro {options['batch.micro']}"]
    if layers != "none":
        parts.append(f"recompute {layers}")
    elif modules:
        parts.append("recompute " + "+".join(modules))
    if options["parallel.overlap_expert_comm"]:
        parts.append("overlap")
    if options["parallel.dispatcher"] != "alltoall":
        parts.append(options["parallel.dispatcher"])
    if not options["optim.distributed"]:
        parts.append("optimizer whole")
    return ", ".join(parts)


def _print_candidates(title: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = table_of(title, "", "layout", "step", "memory", "behind the first by")
    for column in (table.columns[1], table.columns[4]):
        column.justify = "left"
    for number, row in enumerate(rows, start=1):
        equal = "= " if number > 1 and row["equal_within_band"] else ""
        apart = row["separated_by"]
        behind = options_text(row["options"])
        if number > 1:
            behind = f"{apart['seconds']:+.3f} s {apart['term']}; {behind}"
        table.add_row(
            str(number),
            row["layout"],
            f"{equal}{row['step_seconds']:.3f} s",
            f"{row['memory_bytes'] / GB:.1f} GB {row['memory_share']:.0%}",
            behind,
        )
    console.print(table)


def _print_requested(requested: dict[str, Any], console: Console) -> None:
    if requested["layout"] is None:
        console.print(f"The layout asked for is refused: {requested['reason']}", markup=False)
        return
    by = f" (by {requested['chosen_by']})" if requested["chosen_by"] == "parallel=auto" else ""
    console.print(
        f"Asked for: {requested['layout']}{by}, {requested['step_seconds']:.3f} s, "
        f"{requested['memory_bytes'] / GB:.1f} GB: {requested['reason']}.",
        markup=False,
    )


def _print_frontier(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = table_of("Time against memory", "layout", "step", "memory", "free", "options")
    table.columns[4].justify = "left"
    for row in rows[:SHOWN]:
        table.add_row(
            row["layout"],
            f"{row['step_seconds']:.3f} s",
            f"{row['memory_bytes'] / GB:.1f} GB",
            f"{row['margin']:.0%}",
            options_text(row["options"]),
        )
    console.print(table)
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN} slower, smaller ones (--json)")


def print_proofs(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Peaks on fake tensors beside the predicted ones, without allowances, with torch's kernels."""
    table = table_of(
        "Memory of the real step on fake tensors, torch's kernels", "layout", "stage", "peak",
        "predicted", "off", "",
    )  # fmt: skip
    table.columns[5].justify = "left"
    for row in rows:
        if row["skipped"]:
            table.add_row(row["layout"], "", "", "", "", f"not run: {row['skipped']}")
            continue
        table.add_row(
            row["layout"],
            str(row["stage"]),
            f"{row['peak_bytes'] / GB:.2f} GB",
            f"{row['predicted_bytes'] / GB:.2f} GB",
            f"{row['difference']:+.1%}",
            row["changed"],
        )
    console.print(table)


def print_trials(report: dict[str, Any], console: Console) -> None:
    """What the runs of ``--measure`` took, the cost model refitted to them, and the choice."""
    table = table_of("Measured here", "layout", "median step", "steps", "predicted", "refitted")
    for row in report["trials"]:
        table.add_row(
            row["layout"],
            f"{row['median_seconds']:.3f} s",
            str(len(row["seconds"])),
            f"{row['predicted_seconds']:.3f} s",
            f"{row['refitted_seconds']:.3f} s",
        )
    console.print(table)
    factors = ", ".join(f"{name} x {factor:.2f}" for name, factor in report["factors"].items())
    console.print(f"Refitted: {factors}")
    if report["unmeasured"]:
        row = report["unmeasured"]
        console.print(
            f"Of what did not run, {row['layout']} is the fastest by the refit: "
            f"{row['refitted_seconds']:.3f} s"
        )
    console.print("[bold]Fastest:[/bold] " + report["trials"][0]["layout"])
    console.print("  " + shlex.join(report["trials"][0]["overrides"]), highlight=False,
                  markup=False, soft_wrap=True)  # fmt: skip
