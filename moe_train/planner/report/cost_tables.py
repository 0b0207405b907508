"""Memory, compute, communication and time as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from moe_train.planner.report.style import table_of, unit_of

SHOWN = 16
"""Stages shown at most; the JSON has all."""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def print_costs(report: dict[str, Any], console: Console) -> None:
    """Print the cost part of `moe_train.planner.report.plan_report.plan_report`."""
    _memory(report["memory"], report["hardware"], console)
    _optimizers(report["memory"], console)
    _compute(report["compute"], console)
    _communication(report["communication"], console)
    _time(report, console)


def _memory(memory: dict[str, Any], hardware: dict[str, Any], console: Console) -> None:
    stages = memory["stages"][:SHOWN]
    unit = unit_of(stage["total_bytes"] for stage in stages)
    table = table_of(
        f"Memory of a rank, {unit.prefix}B; {hardware['name']} has {hardware['memory_gb']:g} GB",
        "stage", "held", "weights", "grads", "optim", "activ.", "spare", "total", "of device",
    )  # fmt: skip
    for stage in stages:
        spare = stage["fragmentation_bytes"] + stage["reserved_bytes"]
        figures = [
            stage[f"{name}_bytes"] for name in ("weight", "gradient", "optimizer", "activation")
        ]
        table.add_row(
            str(stage["stage"]),
            str(stage["held"]),
            *(unit.show(value) for value in (*figures, spare, stage["total_bytes"])),
            _share(stage["fraction"]),
        )
    console.print(table)
    console.print(
        "held: micro-batches in flight; spare: reserved for the runtime, and fragmentation. Peaks: "
        + "; ".join(f"stage {stage['stage']}: {stage['peak']}" for stage in stages)
    )


def _optimizers(memory: dict[str, Any], console: Console) -> None:
    rows = memory["optimizers"]
    unit = unit_of(row["total_bytes"] for row in rows)
    table = table_of(
        f"The fullest rank under other optimizers, {unit.prefix}B",
        "optimizer", "state", "+ activations", "+ spare", "of device", "fits",
    )  # fmt: skip
    for row in rows:
        figures = (row["state_bytes"], row["tensor_bytes"], row["total_bytes"])
        table.add_row(
            row["optimizer"],
            *(unit.show(value, 1) for value in figures),
            _share(row["fraction"]),
            "yes" if row["fits"] else "[bold]no[/bold]",
        )
    console.print(table)
    kinds = []
    for row in memory["optimizers"]:
        if row["optimizer"] in ("plain Adam", "precision-aware"):
            parts = " + ".join(f"{size} {part}" for part, size in row["each"].items())
            kinds.append(f"{row['optimizer']} {parts} = {sum(row['each'].values())}")
    console.print(
        f"Bytes a parameter: {'; '.join(kinds)}. Figures quoted without an optimizer are weights, "
        "gradients and activations alone (first row)."
    )


def _compute(costs: dict[str, Any], console: Console) -> None:
    parts = [*costs["layer_parts"], *costs["end_parts"]]
    unit = unit_of(part["flops"] for part in parts)
    table = table_of(
        "A layer, embedding and head, one micro-batch",
        "part", f"{unit.prefix}FLOP forward", "ms forward", "ms backward", "formula",
    )  # fmt: skip
    for part in parts:
        table.add_row(
            part["name"], unit.show(part["flops"], 1), f"{1e3 * part['seconds']:.3f}",
            f"{1e3 * part['backward_seconds']:.3f}", part["formula"],
        )  # fmt: skip
    console.print(table)
    token = costs["flops_per_token"]["total"]
    each = unit_of([token])
    again = " with recomputation" if costs["layer_is_recomputed"] else ""
    console.print(
        f"A layer: {1e3 * costs['layer_forward_seconds']:.2f} ms forward, "
        f"{1e3 * costs['layer_backward_seconds']:.2f} ms backward{again}, communication included; "
        f"{each.show(token)} {each.prefix}FLOP a token"
    )


def _communication(traffic: list[dict[str, Any]], console: Console) -> None:
    if not traffic:
        return
    unit = unit_of(one["intra_bytes"] + one["inter_bytes"] for one in traffic)
    table = table_of(
        f"Traffic of a rank of a middle stage, one step, {unit.prefix}B inside and between nodes",
        "what", "group", "ranks", "calls", "inside", "between", "ms",
    )  # fmt: skip
    for one in traffic:
        table.add_row(
            one["name"], one["kind"], str(one["size"]), str(one["calls"]),
            unit.show(one["intra_bytes"]), unit.show(one["inter_bytes"]),
            f"{1e3 * one['seconds']:.1f}",
        )  # fmt: skip
    console.print(table)


def _time(report: dict[str, Any], console: Console) -> None:
    time = report["time"]
    mfu = "" if time["mfu"] is None else f", MFU {100 * time['mfu']:.1f} %"
    console.print(
        f"Predicted step: {time['step_seconds']:.3f} s = pipeline {time['pipeline_seconds']:.3f} "
        f"(bubble {100 * time['bubble']:.1f} %) + exposed gradients "
        f"{time['exposed_gradient_seconds']:.3f} + optimizer {time['optimizer_seconds']:.3f}; "
        f"{time['tokens_per_second']:,.0f} tokens/s, "
        f"{time['sequences_per_second']:,.1f} sequences/s{mfu}"
    )
    table = table_of("What a step is spent on, average of the ranks", "term", "s", "share")
    for name, seconds in time["terms"].items():
        if seconds:
            table.add_row(name, f"{seconds:.4f}", _share(seconds / time["step_seconds"]))
    console.print(table)
    taken = report["assumptions"]
    console.print(
        f"Assumed: imbalance {taken['imbalance']:g}, fragmentation {taken['fragmentation']:g}"
    )
