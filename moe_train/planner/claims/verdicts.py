"""From a claim and a plan to a verdict: confirmed, refuted, true only if ..., contradicts claim N.

In this order: the quantity itself; another reading of the same words; overrides under which it
holds; the values of one key for which it holds. A condition that breaks another claim, or a value
that another claim of the same subject excludes, makes it a contradiction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from moe_train.config.schema import value_at, with_values
from moe_train.errors import ConfigFaults
from moe_train.parallel.rules import layout_faults
from moe_train.planner.claims.document import Claim, Document
from moe_train.planner.claims.solve import solve
from moe_train.planner.claims.subject import QUANTITIES, Subject
from moe_train.planner.memory.fit import fits

CONFIRMED = "confirmed"
REFUTED = "refuted"
CONDITIONAL = "true only if"
CONTRADICTS = "contradicts"

Replan = Callable[[Sequence[str]], Subject]
"""The plan under further overrides; raises ConfigFaults where that is not legal."""


@dataclass(frozen=True)
class Verdict:
    """What the plan says to a claim."""

    claim: Claim
    kind: str
    value: float | None
    reason: str
    condition: str = ""
    contradicts: tuple[str, ...] = ()
    shown: dict[str, float] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The verdict in the words of a report."""
        if self.kind == CONTRADICTS:
            return f"contradicts claim {', '.join(self.contradicts)}"
        if self.kind == CONDITIONAL:
            return f"true only if {self.condition}"
        return self.kind


def said(name: str, value: float) -> str:
    """A value of the quantity `name` with its unit."""
    unit = QUANTITIES[name].unit
    if unit == "yes/no":
        return "yes" if value else "no"
    if unit.startswith("of "):
        return f"{100 * value:.1f} % {unit}"
    return f"{value:,.4g} {unit}" if abs(value) < 1e4 else f"{value:,.0f} {unit}"


def judge(document: Document, subject: Subject, replan: Replan) -> list[Verdict]:
    """Verdicts on all claims, in the document's order."""
    found: dict[str, Verdict] = {}
    for claim in document.claims:
        if claim.quantity:
            found[claim.id] = _judge(claim, subject, replan, document)
    for claim in document.claims:
        if claim.subject:
            found[claim.id] = _against_its_subject(found[claim.id], document, found)
    for claim in document.claims:
        if claim.about:
            found[claim.id] = _roll_up(claim, found)
    return [found[claim.id] for claim in document.claims]


def _judge(claim: Claim, subject: Subject, replan: Replan, document: Document) -> Verdict:
    asked = QUANTITIES[claim.quantity]
    value = asked.compute(subject)
    shown = {name: QUANTITIES[name].compute(subject) for name in claim.shows}
    base = f"{asked.named(subject)}: {said(claim.quantity, value)}"
    if claim.holds(value) and claim.provided:
        return Verdict(claim, CONDITIONAL, value, base, claim.provided, shown=shown)
    if claim.holds(value):
        return Verdict(claim, CONFIRMED, value, base, shown=shown)
    verdict = Verdict(claim, REFUTED, value, base, shown=shown)
    for name in claim.readings:
        read = QUANTITIES[name].compute(subject)
        if claim.holds(read):
            condition = f"it means {QUANTITIES[name].meaning} ({said(name, read)})"
            return replace(verdict, kind=CONDITIONAL, condition=condition)
    for words in claim.under:
        if other := _under(verdict, words, replan, document):
            return other
    if claim.vary:
        return _solved(verdict, claim.vary, subject)
    return verdict


def _under(verdict: Verdict, words: str, replan: Replan, document: Document) -> Verdict | None:
    claim = verdict.claim
    try:
        other = replan(words.split())
    except ConfigFaults:
        return None
    for name in (claim.quantity, *claim.readings):
        value = QUANTITIES[name].compute(other)
        if not claim.holds(value):
            continue
        condition = f"{words} ({QUANTITIES[name].meaning}: {said(name, value)})"
        broken = tuple(
            each.id
            for each in document.claims
            if each.id in claim.against and not each.holds(QUANTITIES[each.quantity].compute(other))
        )
        kind = CONTRADICTS if broken else CONDITIONAL
        return replace(verdict, kind=kind, condition=condition, contradicts=broken)
    return None


def _solved(verdict: Verdict, key: str, subject: Subject) -> Verdict:
    claim = verdict.claim
    compute = QUANTITIES[claim.quantity].compute

    def quantity_at(number: int) -> float | None:
        assert isinstance(value_at(subject.config, key), int), f"{key} is not an integer"
        config = with_values(subject.config, {key: number})
        if claim.hold_tokens:
            tokens = subject.config.batch.micro * subject.config.data.sequence
            micro = max(round(tokens / config.data.sequence), 1)
            config = with_values(config, {"batch.micro": micro})
        legal = not any(True for _ in layout_faults(config, subject.layout))
        # A value that the device could not run is no condition under which a claim holds.
        runs = legal and fits(config, subject.layout, subject.vocab, subject.assumptions)
        return compute(subject.changed(config)) if runs else None

    unit = subject.layout.tensor * (2 * subject.layout.context if subject.layout.context > 1 else 1)
    found = solve(claim, quantity_at, unit if key == "data.sequence" else 1)
    if found.low is None:
        nearest = f"{said(claim.quantity, found.best)} at {key}={found.best_at}"
        reason = f"{verdict.reason}; nearest over every {key} that fits the device: {nearest}"
        return replace(verdict, reason=reason)
    condition = f"{key} is {found.low:,} to {found.high:,}"
    if claim.hold_tokens:
        condition += ", with batch.micro keeping the tokens of a micro-batch"
    return replace(verdict, kind=CONDITIONAL, condition=condition)


def _against_its_subject(
    verdict: Verdict, document: Document, found: dict[str, Verdict]
) -> Verdict:
    """Claims of one subject with ranges that exclude each other: the weaker one contradicts."""
    claim = verdict.claim
    low, high = claim.range
    rivals = [
        other
        for other in document.claims
        if other.subject == claim.subject
        and other.id != claim.id
        and (other.range[0] > high or other.range[1] < low)
    ]
    if not rivals or verdict.kind == CONFIRMED:
        return verdict
    rank = {CONFIRMED: 0, CONDITIONAL: 1, CONTRADICTS: 2, REFUTED: 2}
    mine = (rank[verdict.kind], _gap(verdict))
    stronger = tuple(r.id for r in rivals if (rank[found[r.id].kind], _gap(found[r.id])) < mine)
    if not stronger:
        return verdict
    return replace(verdict, kind=CONTRADICTS, contradicts=stronger)


def _gap(verdict: Verdict) -> float:
    """How far the plan's own value is from the claim, as a share of it."""
    low, high = verdict.claim.range
    assert verdict.value is not None
    return max(low - verdict.value, verdict.value - high, 0.0) / max(abs(low), 1e-9)


def _roll_up(claim: Claim, found: dict[str, Verdict]) -> Verdict:
    """A claim about other claims, named by id or by the beginning of their ids."""
    rest = [
        verdict
        for name, verdict in found.items()
        if name != claim.id and any(name == one or (one.endswith(".") and name.startswith(one))
                                    for one in claim.about)
    ]  # fmt: skip
    assert rest, f"claim {claim.id} is about nothing"

    def ids(kind: str) -> tuple[str, ...]:
        return tuple(verdict.claim.id for verdict in rest if verdict.kind == kind)

    share = sum(verdict.kind == CONFIRMED for verdict in rest)
    reason = f"{share} of {len(rest)} claims that it rests on are confirmed as they stand"
    refuted, broken, conditional = ids(REFUTED), ids(CONTRADICTS), ids(CONDITIONAL)
    if refuted:
        reason += f"; refuted: {', '.join(refuted)}"
    if broken:
        reason += f"; contradicting others: {', '.join(broken)}"
    if refuted or broken:
        return Verdict(claim, REFUTED, None, reason)
    if conditional:
        condition = f"the conditions of claims {', '.join(conditional)} hold"
        return Verdict(claim, CONDITIONAL, None, reason, condition)
    return Verdict(claim, CONFIRMED, None, reason)
