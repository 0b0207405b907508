"""Memory, compute, communication and time as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

GB = 1e9
SHOWN = 16
"""Stages shown at most; the JSON has all."""


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column(columns[0])
    for name in columns[1:]:
        table.add_column(name, justify="right")
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def print_costs(report: dict[str, Any], console: Console) -> None:
    """Print the cost part of `moe_train.plan.report.plan_report.plan_report`."""
    _memory(report["memory"], report["hardware"], console)
    _optimizers(report["memory"], console)
    _compute(report["compute"], console)
    _communication(report["communication"], console)
    _time(report, console)


def _memory(memory: dict[str, Any], hardware: dict[str, Any], console: Console) -> None:
    table = _table(
        f"Memory of a rank, GB of {hardware['memory_gb']:g} ({hardware['name']})",
        "stage", "held", "weights", "gradients", "optimizer", "activations", "allowances",
        "total", "of device", "peak at",
    )  # fmt: skip
    for stage in memory["stages"][:SHOWN]:
        allowances = stage["fragmentation_bytes"] + stage["reserved_bytes"]
        figures = [
            stage[f"{name}_bytes"] for name in ("weight", "gradient", "optimizer", "activation")
        ]
        table.add_row(
            str(stage["stage"]),
            str(stage["held"]),
            *(f"{value / GB:.2f}" for value in (*figures, allowances, stage["total_bytes"])),
            _share(stage["fraction"]),
            stage["peak"],
        )
    console.print(table)


def _optimizers(memory: dict[str, Any], console: Console) -> None:
    table = _table(
        "The fullest rank under other optimizers, GB",
        "optimizer", "state", "with activations", "with allowances", "of device", "fits",
    )  # fmt: skip
    for row in memory["optimizers"]:
        figures = (row["state_bytes"], row["tensor_bytes"], row["total_bytes"])
        table.add_row(
            row["optimizer"],
            *(f"{value / GB:.1f}" for value in figures),
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
    table = _table(
        "A layer, embedding and head, one micro-batch",
        "part", "GFLOP forward", "ms forward", "ms backward", "formula",
    )  # fmt: skip
    for part in (*costs["layer_parts"], *costs["end_parts"]):
        table.add_row(
            part["name"], f"{part['flops'] / 1e9:,.1f}", f"{1e3 * part['seconds']:.3f}",
            f"{1e3 * part['backward_seconds']:.3f}", part["formula"],
        )  # fmt: skip
    console.print(table)
    again = " with recomputation" if costs["layer_is_recomputed"] else ""
    console.print(
        f"A layer: {1e3 * costs['layer_forward_seconds']:.2f} ms forward, "
        f"{1e3 * costs['layer_backward_seconds']:.2f} ms backward{again}, communication included; "
        f"{costs['flops_per_token']['total'] / 1e9:.2f} GFLOP a token"
    )


def _communication(traffic: list[dict[str, Any]], console: Console) -> None:
    table = _table(
        "Traffic of a rank of a middle stage, one step",
        "what", "group", "ranks", "calls", "GB inside nodes", "GB between nodes", "ms",
    )  # fmt: skip
    for one in traffic:
        table.add_row(
            one["name"], one["kind"], str(one["size"]), str(one["calls"]),
            f"{one['intra_bytes'] / GB:.3f}", f"{one['inter_bytes'] / GB:.3f}",
            f"{1e3 * one['seconds']:.1f}",
        )  # fmt: skip
    if table.row_count:
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
    taken = report["assumptions"]
    console.print(
        f"Assumed: imbalance {taken['imbalance']:g}, fragmentation {taken['fragmentation']:g}, "
        + "; ".join(taken[key] for key in ("order", "exchange", "gradients"))
    )
    console.print("Formulas: " + "; ".join(f"{k}: {v}" for k, v in report["sources"].items()))
