"""From a claim and a plan to a verdict.

Confirmed, refuted, true only if ..., contradicts claim N, or not judged: an opinion, or a
comparison without a rival. In this order: the quantity itself (within
the error of predicted times nothing is judged);
another reading of the same claim; overrides under which it holds; the values of one key for which
it holds; the best layout that a search finds. A condition that breaks a claim that the plan
confirms makes it a contradiction, and conditions that exclude each other name each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from moe_train.config.schema import value_at, with_values
from moe_train.errors import ConfigFaults
from moe_train.parallel.sizes import is_legal
from moe_train.planner.claims.comparisons import best_mfu
from moe_train.planner.claims.conditions import (
    Needs,
    exclusive,
    joined,
    needs_of,
    with_exclusions,
)
from moe_train.planner.claims.document import Claim, Document
from moe_train.planner.claims.quantities import QUANTITIES, Quantity
from moe_train.planner.claims.solve import solve
from moe_train.planner.estimate import Estimate
from moe_train.planner.memory.fit import fits
from moe_train.planner.plan import BAND

CONFIRMED = "confirmed"
REFUTED = "refuted"
CONDITIONAL = "true only if"
CONTRADICTS = "contradicts"
NOT_JUDGED = "not judged"

FAR = 2.0
"""A claim that misses the plan's own value by more than this factor is refuted, whatever other
value of a key would make it true."""

Replan = Callable[[Sequence[str]], Estimate]
"""The plan under further overrides; raises ConfigFaults where that is not legal."""


@dataclass(frozen=True)
class Verdict:
    """The plan's verdict on a claim."""

    claim: Claim
    kind: str
    value: float | None
    reason: str
    condition: str = ""
    needs: Needs = field(default_factory=dict)
    """What the condition asks of config keys."""
    contradicts: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    """Claims whose conditions cannot hold together with this one's."""
    shown: dict[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The verdict as a report prints it."""
        if self.kind == CONTRADICTS:
            return f"contradicts claim {', '.join(self.contradicts)}"
        if self.kind != CONDITIONAL:
            return self.kind
        apart = f"; never together with claim {', '.join(self.excludes)}" if self.excludes else ""
        return f"true only if {self.condition}{apart}"


def judge(document: Document, plan: Estimate, replan: Replan) -> list[Verdict]:
    """Verdicts on all claims, in the document's order."""
    verdicts: dict[str, Verdict] = {}
    standing = [
        claim
        for claim in document.claims
        if claim.quantity
        and not QUANTITIES[claim.quantity].searches
        and _holds(claim, QUANTITIES[claim.quantity], plan)
    ]
    for claim in document.claims:
        if claim.opinion:
            reason = "an opinion: it names nothing that could be computed or measured"
            verdicts[claim.id] = Verdict(claim, NOT_JUDGED, None, reason)
        elif claim.quantity:
            verdicts[claim.id] = _judge(claim, plan, replan, standing)
        elif claim.evidence:
            verdicts[claim.id] = Verdict(claim, CONFIRMED, None, "the program is tested for it")
    for claim in document.claims:
        if claim.subject:
            verdicts[claim.id] = _against_its_subject(verdicts[claim.id], document, verdicts)
    for claim in document.claims:
        _roll_up(claim, document, verdicts)
    for name, excludes in with_exclusions({n: v.needs for n, v in verdicts.items()}).items():
        verdicts[name] = replace(verdicts[name], excludes=excludes)
    return [verdicts[claim.id] for claim in document.claims]


def _holds(claim: Claim, quantity: Quantity, plan: Estimate) -> bool:
    value = quantity.compute(plan)
    return value is not None and claim.holds(value)


def _within_band(claim: Claim, quantity: Quantity, value: float) -> bool:
    """Whether the claim's range meets the values that a prediction of `value` stands for."""
    low, high = claim.range
    least, most = quantity.spread(value)
    return least <= high and low <= most


def _judge(claim: Claim, plan: Estimate, replan: Replan, standing: list[Claim]) -> Verdict:
    quantity = QUANTITIES[claim.quantity]
    value = quantity.compute(plan)
    computed = {name: QUANTITIES[name].compute(plan) for name in claim.shows}
    shown = {name: one for name, one in computed.items() if one is not None}
    if value is None:
        reason = f"{quantity.meaning}: none here, or nothing that fits to compare it with"
        return Verdict(claim, NOT_JUDGED, None, reason, shown=shown)
    base = f"{quantity.describe(plan)}: {quantity.text(value)}"
    verdict = Verdict(claim, REFUTED, value, base, shown=shown)
    if claim.holds(value):
        kind = CONDITIONAL if claim.provided else CONFIRMED
        return replace(verdict, kind=kind, condition=claim.provided)
    if _within_band(claim, quantity, value):
        reason = f"{base}, too near to tell: predicted times may be off by {100 * BAND:.0f} %"
        return replace(verdict, kind=NOT_JUDGED, reason=reason)
    for name in claim.readings:
        read = QUANTITIES[name].of(plan)
        if claim.holds(read):
            condition = f"it means {QUANTITIES[name].meaning} ({QUANTITIES[name].text(read)})"
            return replace(verdict, kind=CONDITIONAL, condition=condition)
    if claim.readings and claim.equals:
        verdict = _nearest_reading(verdict, plan)
    others = [
        one for overrides in claim.under if (one := _under(verdict, overrides, replan, standing))
    ]
    if others:
        return min(others, key=lambda one: len(one.contradicts))
    if claim.vary:
        verdict = _solved(verdict, claim.vary, plan)
    if claim.search and verdict.kind == REFUTED:
        verdict = _searched(verdict, plan)
    return verdict


def _nearest_reading(verdict: Verdict, plan: Estimate) -> Verdict:
    claim, wanted = verdict.claim, verdict.claim.equals
    assert wanted is not None
    values = {name: QUANTITIES[name].of(plan) for name in (claim.quantity, *claim.readings)}
    name = min(values, key=lambda one: abs(values[one] - wanted))
    near, off = QUANTITIES[name], values[name] / wanted - 1
    reason = (
        f"{verdict.reason}; it matches none of its readings: the nearest is "
        f"{near.meaning}, {near.text(values[name])} ({100 * off:+.1f} %)"
    )
    return replace(verdict, reason=reason)


def _under(
    verdict: Verdict, overrides: str, replan: Replan, standing: list[Claim]
) -> Verdict | None:
    claim = verdict.claim
    try:
        other = replan(overrides.split())
    except ConfigFaults:
        return None
    for name in (claim.quantity, *claim.readings):
        value = QUANTITIES[name].compute(other)
        if value is None or not claim.holds(value):
            continue
        condition = f"{overrides} ({QUANTITIES[name].meaning}: {QUANTITIES[name].text(value)})"
        broken = _broken(other, standing)
        kind = CONTRADICTS if broken else CONDITIONAL
        return replace(
            verdict,
            kind=kind,
            condition=condition,
            contradicts=broken,
            needs=needs_of(overrides.split()),
        )
    return None


def _broken(other: Estimate, standing: list[Claim]) -> tuple[str, ...]:
    """Claims that the plan confirms and another one does not."""
    return tuple(
        claim.id for claim in standing if not _holds(claim, QUANTITIES[claim.quantity], other)
    )


def _solved(verdict: Verdict, key: str, plan: Estimate) -> Verdict:
    claim = verdict.claim
    quantity = QUANTITIES[claim.quantity]
    compute = quantity.compute

    def quantity_at(number: int) -> float | None:
        assert isinstance(value_at(plan.config, key), int), f"{key} is not an integer"
        config = with_values(plan.config, {key: number})
        if claim.hold_tokens:
            tokens = plan.config.batch.micro * plan.config.data.sequence
            micro = max(round(tokens / config.data.sequence), 1)
            config = with_values(config, {"batch.micro": micro})
        changed = plan.under(config)
        # A value that the device cannot run is no condition under which a claim holds.
        runs = is_legal(config, plan.layout) and fits(changed)
        return compute(changed) if runs else None

    layout = plan.layout
    unit = layout.tensor * (2 * layout.context if layout.context > 1 else 1)
    solution = solve(claim, quantity_at, unit if key == "data.sequence" else 1)
    if solution.low is None or solution.high is None:
        nearest = "no value fits the device"
        if solution.best_at:
            at = f"{key}={solution.best_at:,}"
            nearest = f"nearest over every {key} that fits: {quantity.text(solution.best)} at {at}"
        return replace(verdict, reason=f"{verdict.reason}; {nearest}")
    condition = f"{key} is {solution.low:,} to {solution.high:,}"
    if claim.hold_tokens:
        condition += ", with batch.micro keeping the tokens of a micro-batch"
    needs: Needs = {key: (solution.low, solution.high)}
    off = _factor(verdict)
    if off > FAR:
        reason = f"{verdict.reason}, {off:.0f} times off; it would take that {condition}"
        return replace(verdict, reason=reason, condition=condition, needs=needs)
    return replace(verdict, kind=CONDITIONAL, condition=condition, needs=needs)


def _factor(verdict: Verdict) -> float:
    """The factor between the plan's own value and the nearer end of the claim."""
    low, high = verdict.claim.range
    value = verdict.value
    if not value:
        return inf
    return low / value if value < low else value / high


def _searched(verdict: Verdict, plan: Estimate) -> Verdict:
    """The MFU of the best layout for the plan's batch."""
    assert verdict.claim.quantity == "time.mfu", "searches maximise the MFU, and nothing else"
    best = best_mfu(plan)
    if best is None:
        return replace(verdict, reason=f"{verdict.reason}; no layout reaches more by the band")
    value, overrides = best
    text = f"{QUANTITIES['time.mfu'].text(value)} with {overrides}"
    if verdict.claim.holds(value):
        needs = needs_of(overrides.split())
        return replace(verdict, kind=CONDITIONAL, condition=text, needs=needs)
    return replace(verdict, reason=f"{verdict.reason}; over layouts: {text}")


def _against_its_subject(
    verdict: Verdict, document: Document, verdicts: Mapping[str, Verdict]
) -> Verdict:
    """Claims of one subject with ranges that exclude each other: the weaker one contradicts."""
    claim = verdict.claim
    low, high = claim.range
    stronger = tuple(
        other.id
        for other in document.claims
        if other.subject == claim.subject
        and (other.range[0] > high or other.range[1] < low)
        and verdicts[other.id].kind in (CONFIRMED, CONDITIONAL)
    )
    if not stronger or verdict.kind == CONFIRMED:
        return verdict
    if verdict.kind == REFUTED:
        return replace(
            verdict, reason=f"{verdict.reason}; claim {', '.join(stronger)} says otherwise"
        )
    return replace(verdict, kind=CONTRADICTS, contradicts=stronger)


def _roll_up(claim: Claim, document: Document, verdicts: dict[str, Verdict]) -> Verdict:
    """The verdict on a claim, those about other claims by these first."""
    if not claim.about:
        return verdicts[claim.id]
    if claim.id in verdicts:
        return verdicts[claim.id]
    rest = [
        _roll_up(other, document, verdicts)
        for other in document.claims
        if other.id != claim.id and not other.opinion and _rests_on(claim, other.id)
    ]
    assert rest, f"claim {claim.id} is about nothing"
    verdicts[claim.id] = _sum_up(claim, rest)
    return verdicts[claim.id]


def _rests_on(claim: Claim, name: str) -> bool:
    return any(name == one or (one.endswith(".") and name.startswith(one)) for one in claim.about)


def _sum_up(claim: Claim, rest: list[Verdict]) -> Verdict:
    ids = {kind: [one.claim.id for one in rest if one.kind == kind] for kind in
           (CONFIRMED, REFUTED, CONTRADICTS, CONDITIONAL, NOT_JUDGED)}  # fmt: skip
    reason = f"{len(ids[CONFIRMED])} of {len(rest)} claims that it rests on are confirmed"
    for kind, title in (
        (REFUTED, "refuted"),
        (CONTRADICTS, "contradicting others"),
        (NOT_JUDGED, "not judged"),
    ):
        if ids[kind]:
            reason += f"; {title}: {', '.join(ids[kind])}"
    apart = [one for one in rest if any(exclusive(one.needs, other.needs) for other in rest)]
    if apart:
        reason += f"; conditions that exclude each other: {', '.join(o.claim.id for o in apart)}"
    if ids[REFUTED] or ids[CONTRADICTS] or apart:
        return Verdict(claim, REFUTED, None, reason)
    if ids[NOT_JUDGED]:
        return Verdict(claim, NOT_JUDGED, None, reason)
    if ids[CONDITIONAL]:
        condition = f"the conditions of claims {', '.join(ids[CONDITIONAL])} hold"
        return Verdict(claim, CONDITIONAL, None, reason, condition, joined(o.needs for o in rest))
    return Verdict(claim, CONFIRMED, None, reason)
