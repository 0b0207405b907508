"""Verdicts as Markdown, with the sections of the claims' own document, and as plain data."""

from __future__ import annotations

from collections import Counter
from math import isfinite
from typing import Any

from moe_train.planner.claims.document import Document
from moe_train.planner.claims.subject import QUANTITIES, Subject
from moe_train.planner.claims.verdicts import Verdict, said
from moe_train.planner.report.costs import ASSUMED, SOURCES


def as_data(document: Document, verdicts: list[Verdict], subject: Subject) -> dict[str, Any]:
    """Plain mapping: every claim with its verdict, value, reason and condition."""
    return {
        "title": document.title,
        "overrides": list(document.overrides),
        "layout": subject.layout.tag,
        "world": subject.layout.world,
        "hardware": subject.config.hardware.name,
        "counts": dict(Counter(verdict.kind for verdict in verdicts)),
        "claims": [
            {
                "id": verdict.claim.id,
                "text": verdict.claim.text,
                "quantity": verdict.claim.quantity or None,
                "claimed": None if verdict.claim.about else _bounds(verdict.claim.range),
                "value": verdict.value,
                "verdict": verdict.kind,
                "words": verdict.words,
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
        f"{QUANTITIES[name].meaning}: {said(name, value)}" for name, value in verdict.shown.items()
    ]
    if verdict.claim.note:
        parts.append(verdict.claim.note)
    return "; ".join(parts)


def as_markdown(document: Document, verdicts: list[Verdict], subject: Subject) -> str:
    """The report, one table a section."""
    by_id = {verdict.claim.id: verdict for verdict in verdicts}
    counts = Counter(verdict.kind for verdict in verdicts)
    hardware = subject.config.hardware
    lines = [
        f"# {document.title}",
        "",
        f"Plan: {subject.layout.tag} on {subject.layout.world} x {hardware.name} "
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
            cells = (claim.id, claim.text, f"**{verdict.words}**", explanation(verdict))
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    lines += ["", "## Assumptions", ""]
    taken = subject.assumptions
    lines.append(f"- imbalance {taken.imbalance:g}, fragmentation {taken.fragmentation:g}")
    lines += [f"- {name}: {text}" for name, text in ASSUMED.items()]
    lines += [f"- hardware, {name}: {text}" for name, text in hardware.sources.items()]
    lines += ["", "## Sources of the formulas", ""]
    lines += [f"- {name}: {text}" for name, text in SOURCES.items()]
    return "\n".join(lines) + "\n"
