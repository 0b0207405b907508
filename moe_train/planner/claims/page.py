"""The first page: what came out, refuted claims first, in sentences for the document's author."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_train.planner.claims.document import FIGURE, Document
from moe_train.planner.claims.quantities import QUANTITIES
from moe_train.planner.claims.verdicts import (
    CONDITIONAL,
    CONFIRMED,
    CONTRADICTS,
    NOT_JUDGED,
    REFUTED,
    Verdict,
)
from moe_train.planner.estimate import Estimate
from moe_train.planner.plan import BAND

WIDTH, LINES = 80, 40
KINDS = {
    REFUTED: "refuted",
    CONTRADICTS: "against other claims",
    CONDITIONAL: "true under a condition",
    NOT_JUDGED: "not judged",
    CONFIRMED: "confirmed",
}
"""The verdicts in the page's order, and what it calls them."""


@dataclass(frozen=True)
class Sentence:
    """A claim that does not stand, and why; each of its numbers is a quantity of the plan."""

    id: str
    text: str
    figures: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Lines of `WIDTH` columns, broken between words."""
        return wrapped(f"{self.id:6}{self.text}", 6)


def sentences(verdicts: Sequence[Verdict], plan: Estimate) -> list[Sentence]:
    """One for each refuted claim that is about a quantity, in the document's order."""
    return [
        _sentence(one, plan)
        for one in verdicts
        if one.kind in (REFUTED, CONTRADICTS) and one.claim.quantity
    ]


def _sentence(verdict: Verdict, plan: Estimate) -> Sentence:
    claim = verdict.claim
    if not claim.plain:
        assert verdict.value is not None, f"claim {claim.id} is refuted without a value"
        quantity = QUANTITIES[claim.quantity]
        text = f"{claim.text}: {quantity.meaning} comes to {quantity.text(verdict.value)}."
        return Sentence(claim.id, text, {claim.quantity: verdict.value})
    figures = {name: QUANTITIES[name].of(plan) for name in FIGURE.findall(claim.plain)}
    return Sentence(claim.id, f"{claim.text}: {filled(claim.plain, figures)}", figures)


def filled(plain: str, figures: dict[str, float]) -> str:
    """A sentence with the values of its quantities."""
    return FIGURE.sub(lambda one: QUANTITIES[one[1]].text(figures[one[1]]), plain)


def first_page(document: Document, verdicts: Sequence[Verdict], plan: Estimate) -> str:
    """At most `LINES` lines of `WIDTH` columns."""
    ids = {kind: [one.claim.id for one in verdicts if one.kind == kind] for kind in KINDS}
    hardware = plan.config.hardware
    counts = ", ".join(f"{len(ids[kind])} {title}" for kind, title in KINDS.items())
    head = [
        *wrapped(document.title, 0),
        *wrapped(
            f"Plan: {plan.layout.tag} on {plan.layout.world} x {hardware.name}. Computed, not "
            f"measured; predicted times may be off by {100 * BAND:.0f} %.",
            0,
        ),
        *wrapped(f"Of {len(verdicts)} claims: {counts}.", 0),
    ]
    tail: list[str] = []
    sums = [one.claim.id for one in verdicts if one.claim.about and one.kind == REFUTED]
    for title, names in (
        ("Refuted with them", sums),
        ("True under a condition", ids[CONDITIONAL]),
        ("Not judged", ids[NOT_JUDGED]),
        ("Confirmed", ids[CONFIRMED]),
    ):
        if names:
            tail += wrapped(f"{title}: {', '.join(names)}.", 2)
    tail += wrapped("--full: every claim with its reason; --report FILE: the same as Markdown.", 0)
    body = [one.lines() for one in sentences(verdicts, plan)]
    left = 0
    while sum(map(len, body)) + (left > 0) > LINES - len(head) - len(tail):
        body.pop()
        left += 1
    more = [f"      ... and {left} more: --full"] if left else []
    return "\n".join([*head, *(line for lines in body for line in lines), *more, *tail])


def wrapped(text: str, indent: int) -> list[str]:
    """Lines of at most `WIDTH` columns, broken between words alone."""
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
