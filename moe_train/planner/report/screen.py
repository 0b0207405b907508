"""The plan on one screen: what a user asks first, in at most 40 lines of 80 columns."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from moe_train.planner.report.style import billions, seconds_text, share_text

WIDTH = 80
LABEL = 12
"""Columns of the labels on the left."""


def print_screen(report: dict[str, Any], warnings: Sequence[str], console: Console) -> None:
    """Print the first screen of `moe_train.planner.report.plan_report.plan_report`'s mapping.

    Args:
        warnings: sentences; the first ones that the screen has room for are printed.
    """
    lines = [*_wrapped(heading(report), 0)]
    for label, text in rows(report):
        lines += _row(label, text)
    shown = [line for text in warnings for line in _row("warning", text)] or _row(
        "warnings", "none"
    )
    profile = f"configs/hardware/{report['hardware']['name']}.yaml"
    closing = _wrapped(
        "--full prints the tables. Assumptions and sources of the formulas: docs/planning.md; of "
        f"the hardware's figures: {profile}.",
        0,
    )
    free = 40 - len(lines) - len(closing) - 1
    if len(shown) > free:
        left = _row("", "... further warnings: --full")
        shown = shown[: free - len(left)] + left
    for line in (*lines, *shown, *closing):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_warnings(warnings: Sequence[str], console: Console) -> None:
    """Print every warning, however many lines it takes."""
    for line in (line for text in warnings for line in _row("warning", text)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _wrapped(text: str, indent: int) -> list[str]:
    """Lines of at most `WIDTH` columns, broken between words alone: overrides are to be copied."""
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def _row(label: str, text: str) -> list[str]:
    return _wrapped(f"{label:{LABEL}}{text}", LABEL)


def heading(report: dict[str, Any]) -> str:
    """Experiment, layout and hardware."""
    layout, hardware = report["layout"], report["hardware"]
    why = f" ({report['experiment_reason']})" if report["experiment_reason"] else ""
    nodes = ""
    if hardware["kind"] != "cpu":
        nodes = f", {hardware['devices_per_node']} a node"
    ranks = f"{layout['world']} x {hardware['name']}{nodes}"
    return f"{report['experiment']}{why}: {layout['tag']} on {ranks}"


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text of each row; every number is one of the report's, or a ratio of two."""
    time, batch, band = report["time"], report["batch"], report["time"]["band"]
    counts, step = report["parameters"], report["time"]["step_seconds"]
    term, spent = next(iter(time["terms"].items()))
    lines = [
        ("legal", "yes"),
        ("fits", _fits(report)),
        ("recompute", recompute_text(report["recompute"])),
        (
            "parameters",
            f"{billions(counts['total'])}, {billions(counts['active'])} active for a token, "
            f"{billions(counts['largest_rank'])} on the largest rank",
        ),
        (
            "a step",
            f"{batch['tokens_per_step']:,} tokens in {batch['sequences_per_step']:,} sequences; "
            f"{batch['microbatches_per_step']:,} micro-batches of {batch['micro']} a replica",
        ),
        (
            "time",
            f"{seconds_text(step)} a step, {seconds_text(step * (1 - band))} to "
            f"{seconds_text(step * (1 + band))}; {time['tokens_per_second']:,.0f} tokens/s",
        ),
    ]
    if time["mfu"] is not None:
        low, high = time["mfu"] / (1 + band), time["mfu"] / (1 - band)
        text = f"{share_text(time['mfu'])}, {share_text(low)} to {share_text(high)}"
        lines.append(("MFU", text))
    return [
        *lines,
        ("bubble", f"{share_text(time['bubble'])} of the pipeline's time"),
        (
            "bottleneck",
            f"{term}: {seconds_text(spent)} of a step, {share_text(spent / step)}",
        ),
        ("better", _better(report["better"], step, band)),
    ]


def _fits(report: dict[str, Any]) -> str:
    memory = report["memory"]
    worst = memory["stages"][memory["worst_stage"]]
    size, device, left = worst["total_bytes"], memory["device_bytes"], worst["margin_bytes"]
    figures = (
        f"{size / 1e9:.1f} of {device / 1e9:g} GB on a rank of stage {worst['stage']}, "
        f"{abs(left) / 1e9:.1f} GB ({share_text(abs(left) / device)}) "
    )
    if report["fits"]:
        return f"yes{', tight' * memory['tight']}: {figures}margin"
    return f"NO: {figures}too much"


def recompute_text(recompute: dict[str, Any]) -> str:
    """Layers and modules that are recomputed, and what decided so."""
    modules = f", modules {' '.join(recompute['modules'])}" if recompute["modules"] else ""
    source = f" ({recompute['source']})" if "source" in recompute else ""
    return f"layers {recompute['layers']}{modules}{source}"


def _better(better: dict[str, Any], step: float, band: float) -> str:
    if not better["searched"]:
        return f"not searched on {better['world']:,} ranks: moe-train tune"
    if not better["overrides"]:
        more = f"none by more than {share_text(band, 0)} among the most promising layouts"
        return f"{more}; moe-train tune tries all"
    saved = 1 - better["step_seconds"] / step
    # A plan that does not fit is beaten by any that does, however slow.
    change = f"{share_text(abs(saved), 0)} {'less' if saved > 0 else 'more, but fits'}"
    return (
        f"{seconds_text(better['step_seconds'])} a step ({change}), "
        f"{better['total_bytes'] / 1e9:.1f} GB, with {shlex.join(better['overrides'])}"
    )
