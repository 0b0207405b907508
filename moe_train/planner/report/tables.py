"""The plan as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from moe_train.parallel.layout import GROUPS
from moe_train.planner.report.cost_tables import print_costs
from moe_train.planner.report.style import billions, table_of

SHOWN = 32
"""Ranks or groups shown at most; the JSON has all."""


def _rest(table: Table, total: int) -> None:
    if total > SHOWN:
        table.add_row(f"... {total - SHOWN} more (--json has all)")


def print_plan(report: dict[str, Any], console: Console) -> None:
    """Print the mapping of `moe_train.planner.report.plan_report.plan_report` as tables."""
    layout, batch, counts = report["layout"], report["batch"], report["parameters"]
    why = f" ({report['experiment_reason']})" if report["experiment_reason"] else ""
    console.print(
        f"[bold]{report['experiment']}[/bold]{why}: {layout['tag']}, legal"
        + ("" if report["fits"] else "; [bold]does not fit the memory[/bold]")
    )

    names = (
        ("TP", "tensor"), ("CP", "context"), ("DP", "data"), ("PP", "pipeline"),
        ("VPP", "virtual_pipeline"), ("EP", "expert"), ("ETP", "expert_tensor"),
        ("expert DP", "expert_data"), ("placement", "placement"),
    )  # fmt: skip
    sizes = table_of(
        "Layout of 1 rank" if layout["world"] == 1 else f"Layout of {layout['world']} ranks",
        *(name for name, _ in names),
    )
    sizes.add_row(*(str(layout[key]) for _, key in names))
    console.print(sizes)
    console.print(
        f"A step: {batch['microbatches_per_step']} micro-batches of {batch['micro']} a replica, "
        f"{batch['sequences_per_step']} sequences, {batch['tokens_per_step']:,} tokens"
    )
    _print_kernels(report["kernels"], console)
    _print_parameters(report, counts, console)
    _print_stages(report, console)
    _print_ranks(report, console)
    _print_groups(report, console)
    _print_environment(report, console)
    print_costs(report, console)


def _print_kernels(kernels: dict[str, Any], console: Console) -> None:
    console.print(f"Kernels: {kernels['name']} ({kernels['why']}). {kernels['about']}")
    table = table_of("Fusions", "field of TransformerConfig", "value", "why")
    table.columns[2].justify = "left"
    for field, setting in kernels["settings"].items():
        value = setting["value"]
        shown = {True: "on", False: "off"}.get(value, str(value))
        table.add_row(field, shown, setting["why"])
    console.print(table)


def _print_parameters(report: dict[str, Any], counts: dict[str, Any], console: Console) -> None:
    table = table_of("Parameters", "part", "count", "")
    for part in (
        "total", "active", "experts", "attention", "shared_expert", "replicated", "embedding",
        "head", "largest_rank",
    ):  # fmt: skip
        if counts[part]:
            name = {"replicated": "norms and routers", "active": "active for a token"}.get(part)
            table.add_row(
                name or part.replace("_", " "), f"{counts[part]:,}", billions(counts[part])
            )
    console.print(table)
    vocab = report["vocabulary"]
    console.print(f"Vocabulary: {vocab['tokens']:,} in {vocab['rows']:,} rows, {vocab['source']}")


def _print_stages(report: dict[str, Any], console: Console) -> None:
    table = table_of("Layers on stages", "stage", "ranks", "layers")
    for stage in report["stages"][:SHOWN]:
        ranks = stage["ranks"]
        chunks = " | ".join(f"{c[0]}-{c[-1]}" if len(c) > 1 else str(c[0]) for c in stage["chunks"])
        span = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        table.add_row(str(stage["stage"]), span, chunks)
    _rest(table, len(report["stages"]))
    console.print(table)


def _print_ranks(report: dict[str, Any], console: Console) -> None:
    table = table_of(
        "Experts on ranks",
        "rank", "node", "tp cp dp pp", "etp ep edp", "layers", "experts", "modules", "parameters",
    )  # fmt: skip
    for rank in report["ranks"][:SHOWN]:
        dense, expert = rank["dense"], rank["expert"]
        first, last = rank["experts"]
        table.add_row(
            str(rank["rank"]),
            str(rank["node"]),
            " ".join(str(dense[axis]) for axis in ("tp", "cp", "dp", "pp")),
            " ".join(str(expert[axis]) for axis in ("etp", "ep", "edp")),
            rank["expert_layers"],
            f"{first}-{last}",
            str(rank["expert_modules"]),
            f"{rank['parameters']['total']:,}",
        )
    _rest(table, len(report["ranks"]))
    console.print(table)


def _print_groups(report: dict[str, Any], console: Console) -> None:
    table = table_of("Process groups of more than one rank", "kind", "groups", "for", "ranks")
    for column in table.columns[2:]:
        column.justify = "left"
    for kind, groups in report["groups"].items():
        traffic = GROUPS[kind].traffic
        if not traffic or len(groups[0]) == 1:
            continue
        shown = " ".join("[" + " ".join(map(str, g[:16])) + "]" for g in groups[:8])
        table.add_row(
            kind, str(len(groups)), traffic, shown.replace("[", r"\[") +
            (" ..." if len(groups) > 8 or len(groups[0]) > 16 else ""),
        )  # fmt: skip
    if table.row_count:
        console.print(table)
    if report["communicators"] and report["hardware"]["kind"] != "cpu":
        used = ", ".join(f"{kind} of {size}" for kind, size in report["communicators"].items())
        console.print(
            f"A rank opens {len(report['communicators'])} communicators, each with its first "
            f"collective: {used}. {report['hardware']['name']} reserves "
            f"{report['hardware']['reserved_gb']:g} GB for them and the driver"
        )


def _print_environment(report: dict[str, Any], console: Console) -> None:
    if report["hardware"]["kind"] == "cpu":
        return
    names: dict[tuple[str, str], list[str]] = {}
    for one in report["environment"]:
        names.setdefault((one["value"] or "(left as it is)", one["why"]), []).append(one["name"])
    console.print("Environment that a run on these devices sets")
    for (value, why), alike in names.items():
        console.print(f"  {', '.join(alike)} = {value}\n    {why}", markup=False, highlight=False)
