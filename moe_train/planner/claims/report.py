"""Check a claims file against a plan: verdicts as a table, as Markdown and as plain data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moe_train.parallel.shapes import Assumptions
from moe_train.planner.claims.document import Document
from moe_train.planner.claims.quantities import QUANTITIES
from moe_train.planner.claims.verdicts import Verdict, judge
from moe_train.planner.estimate import Estimate
from moe_train.planner.plan import assumptions_of
from moe_train.planner.report.costs import ASSUMED, SOURCES
from moe_train.planner.resolution import resolve_run


def as_data(document: Document, verdicts: list[Verdict], plan: Estimate) -> dict[str, Any]:
    """Plain mapping: every claim with its verdict, value, reason and condition."""
    return {
        "title": document.title,
        "overrides": list(document.overrides),
        "layout": plan.layout.tag,
        "world": plan.layout.world,
        "hardware": plan.config.hardware.name,
        "counts": dict(Counter(verdict.kind for verdict in verdicts)),
        "claims": [
            {
                "id": verdict.claim.id,
                "text": verdict.claim.text,
                "quantity": verdict.claim.quantity or None,
                "claimed": None if verdict.claim.about else _bounds(verdict.claim.range),
                "value": verdict.value,
                "verdict": verdict.kind,
                "statement": verdict.text,
                "condition": verdict.condition,
                "contradicts": list(verdict.contradicts),
                "reason": verdict.reason,
                "shown": verdict.shown,
                "note": verdict.claim.note,
            }
            for verdict in verdicts
        ],
    }


def _bounds(claimed: tuple[float, float]) -> list[float | None]:
    """An open end is null: JSON has no infinity."""
    return [value if isfinite(value) else None for value in claimed]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def explanation(verdict: Verdict) -> str:
    """Why: the plan's figures, the other reading's, and the note."""
    parts = [verdict.reason]
    if verdict.contradicts and verdict.condition:
        parts.append(f"it holds only if {verdict.condition}")
    parts += [
        f"{QUANTITIES[name].meaning}: {QUANTITIES[name].text(value)}"
        for name, value in verdict.shown.items()
    ]
    if verdict.claim.note:
        parts.append(verdict.claim.note)
    return "; ".join(parts)


def as_markdown(document: Document, verdicts: list[Verdict], plan: Estimate) -> str:
    """The report, one table a section."""
    by_id = {verdict.claim.id: verdict for verdict in verdicts}
    counts = Counter(verdict.kind for verdict in verdicts)
    hardware = plan.config.hardware
    lines = [
        f"# {document.title}",
        "",
        f"Plan: {plan.layout.tag} on {plan.layout.world} x {hardware.name} "
        f"({hardware.memory_gb:g} GB, {hardware.devices_per_node} a node); overrides: "
        f"`{' '.join(document.overrides)}`.",
        "",
        f"Of {len(verdicts)} claims: "
        + ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        + ". Figures are computed, none is measured.",
    ]
    for section in document.sections:
        lines += ["", f"## {section.title}", "", "| | claim | verdict | why |", "|---|---|---|---|"]
        for claim in section.claims:
            verdict = by_id[claim.id]
            cells = (claim.id, claim.text, f"**{verdict.text}**", explanation(verdict))
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    lines += ["", "## Assumptions", ""]
    assumed = plan.assumptions
    lines.append(f"- imbalance {assumed.imbalance:g}, fragmentation {assumed.fragmentation:g}")
    lines += [f"- {name}: {text}" for name, text in ASSUMED.items()]
    lines += [f"- hardware, {name}: {text}" for name, text in hardware.sources.items()]
    lines += ["", "## Sources of the formulas", ""]
    lines += [f"- {name}: {text}" for name, text in SOURCES.items()]
    return "\n".join(lines) + "\n"


def show(verdicts: list[Verdict], document: Document, console: Console) -> None:
    """Print a table a section."""
    by_id = {verdict.claim.id: verdict for verdict in verdicts}
    for section in document.sections:
        table = Table(
            title=section.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
            padding=(0, 1, 0, 0), leading=1,
        )  # fmt: skip
        table.add_column("", no_wrap=True)
        # Overrides are there to be copied: they may be broken over lines, never cut.
        for name, ratio in (("claim", 5), ("verdict", 3), ("why", 9)):
            table.add_column(name, ratio=ratio, overflow="fold")
        for claim in section.claims:
            verdict = by_id[claim.id]
            table.add_row(claim.id, claim.text, verdict.text, explanation(verdict))
        console.print(table)


def open_plan(
    document: Document, overrides: Sequence[str], world: int, assumptions: Assumptions
) -> tuple[Estimate, list[Verdict]]:
    """The plan that `document` is about, with further overrides, and all verdicts.

    Raises:
        ConfigFaults: that plan is illegal.
    """
    given = [*document.overrides, *overrides]

    def replan(more: Sequence[str]) -> Estimate:
        """The plan with `more` overrides, of which ``world=N`` sets the number of ranks."""
        ranks = [int(one[6:]) for one in more if one.startswith("world=")]
        more = [one for one in more if not one.startswith("world=")]
        changed = {one.partition("=")[0] for one in more}
        rest = [one for one in given if one.partition("=")[0] not in changed]
        run = resolve_run([*rest, *more], ranks[0] if ranks else world)
        imbalance, fragmentation = assumptions.imbalance, assumptions.fragmentation
        # The document's figures are of evenly routed steps.
        return Estimate.of(run, assumptions_of(run.config, imbalance, fragmentation, imbalance))

    plan = replan([])
    return plan, judge(document, plan, replan)


def check_claims(
    document: Document,
    overrides: Sequence[str],
    world: int,
    assumptions: Assumptions,
    console: Console,
) -> tuple[str, str]:
    """Check all claims, print the verdicts, and return the report as (Markdown, JSON)."""
    plan, verdicts = open_plan(document, overrides, world, assumptions)
    show(verdicts, document, console)
    data = as_data(document, verdicts, plan)
    counts = ", ".join(f"{count} {kind}" for kind, count in data["counts"].items())
    console.print(f"{len(verdicts)} claims: {counts}")
    return as_markdown(document, verdicts, plan), json.dumps(data, indent=1) + "\n"
