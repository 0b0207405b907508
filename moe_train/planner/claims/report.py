"""Check a claims file against a plan: verdicts as a table, as Markdown and as plain data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from rich.console import Console

from moe_train.config.schema import value_at
from moe_train.parallel.shapes import Assumptions
from moe_train.planner.claims.comparisons import better, once
from moe_train.planner.claims.document import Document
from moe_train.planner.claims.page import first_page, sentences, wrapped
from moe_train.planner.claims.quantities import QUANTITIES
from moe_train.planner.claims.verdicts import REFUTED, Verdict, judge
from moe_train.planner.estimate import Estimate
from moe_train.planner.plan import assumptions_of
from moe_train.planner.report.better import better_report
from moe_train.planner.report.costs import ASSUMED, SOURCES
from moe_train.planner.resolution import resolve_run


def as_data(document: Document, verdicts: list[Verdict], plan: Estimate) -> dict[str, Any]:
    """Plain mapping: every claim with its verdict, value, reason and condition.

    ``first_page`` has the sentences and their figures, and ``plan`` the plan.json that they
    recompute from.
    """
    return {
        "first_page": [asdict(one) for one in sentences(verdicts, plan)],
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
                "claimed": _bounds(verdict.claim.range) if verdict.claim.quantity else None,
                "value": verdict.value,
                "verdict": verdict.kind,
                "statement": verdict.text,
                "condition": verdict.condition,
                "needs": verdict.needs,
                "contradicts": list(verdict.contradicts),
                "excludes": list(verdict.excludes),
                "evidence": list(verdict.claim.evidence),
                "reason": verdict.reason,
                "shown": verdict.shown,
                "note": verdict.claim.note,
            }
            for verdict in verdicts
        ],
        "ours": {one.key: {"value": value_at(plan.config, one.key), "why": one.why}
                 for one in document.ours},
        "plan": {**plan.report(), "better": better_report(plan, once(plan, better))},
    }  # fmt: skip


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
    if verdict.kind == REFUTED and verdict.excludes:
        parts.append(f"never together with claim {', '.join(verdict.excludes)}")
    parts += [
        f"{QUANTITIES[name].meaning}: {QUANTITIES[name].text(value)}"
        for name, value in verdict.shown.items()
    ]
    if verdict.claim.evidence:
        parts.append(f"shown by {', '.join(verdict.claim.evidence)}")
    if verdict.claim.note:
        parts.append(verdict.claim.note)
    return "; ".join(parts)


def as_markdown(document: Document, verdicts: list[Verdict], plan: Estimate) -> str:
    """The report, one table a section."""
    by_id = {verdict.claim.id: verdict for verdict in verdicts}
    hardware = plan.config.hardware
    lines = [
        f"# {document.title}",
        "",
        f"Plan: {plan.layout.tag} on {plan.layout.world} x {hardware.name} "
        f"({hardware.memory_gb:g} GB, {hardware.devices_per_node} a node); overrides: "
        f"`{' '.join(document.overrides)}`.",
        "",
        "```",
        first_page(document, verdicts, plan),
        "```",
        "",
        "## What the plan assumes and the document does not say",
        "",
        "| setting | value | why |",
        "|---|---|---|",
    ]
    for one in document.ours:
        value = str(value_at(plan.config, one.key))
        lines.append(f"| `{one.key}` | {_cell(value)} | {_cell(one.why)} |")
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
    """Print every claim with its verdict and why, words and overrides unbroken."""
    by_id = {verdict.claim.id: verdict for verdict in verdicts}
    for section in document.sections:
        lines = ["", section.title]
        for claim in section.claims:
            verdict = by_id[claim.id]
            lines += wrapped(f"{claim.id:6}{claim.text}", 6)
            lines += wrapped(f"{'':6}{verdict.text.upper()}" if verdict.kind == verdict.text
                             else f"{'':6}{verdict.text}", 6)  # fmt: skip
            lines += wrapped(f"{'':6}{explanation(verdict)}", 6)
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


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
    *,
    full: bool = False,
) -> tuple[str, str]:
    """Check all claims, print the first page, and return the report as (Markdown, JSON).

    Args:
        full: print a table a section, too.
    """
    plan, verdicts = open_plan(document, overrides, world, assumptions)
    page = first_page(document, verdicts, plan)
    console.print(page, markup=False, highlight=False, soft_wrap=True)
    if full:
        show(verdicts, document, console)
    data = as_data(document, verdicts, plan)
    return as_markdown(document, verdicts, plan), json.dumps(data, indent=1) + "\n"
