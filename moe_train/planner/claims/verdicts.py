"""From a claim and a plan to a verdict: confirmed, refuted, true only if ..., contradicts claim N.

In this order: the quantity itself; another reading of the same claim; overrides under which it
holds; the values of one key for which it holds. A condition that breaks another claim, or a value
that another claim of the same subject excludes, makes it a contradiction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from moe_train.config.schema import value_at, with_values
from moe_train.errors import ConfigFaults
from moe_train.parallel.sizes import is_legal
from moe_train.planner.claims.document import Claim, Document
from moe_train.planner.claims.quantities import QUANTITIES
from moe_train.planner.estimate import Estimate
from moe_train.planner.memory.fit import fits

CONFIRMED = "confirmed"
REFUTED = "refuted"
CONDITIONAL = "true only if"
CONTRADICTS = "contradicts"

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
    contradicts: tuple[str, ...] = ()
    shown: dict[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The verdict as a report prints it."""
        if self.kind == CONTRADICTS:
            return f"contradicts claim {', '.join(self.contradicts)}"
        if self.kind == CONDITIONAL:
            return f"true only if {self.condition}"
        return self.kind


def judge(document: Document, plan: Estimate, replan: Replan) -> list[Verdict]:
    """Verdicts on all claims, in the document's order."""
    verdicts: dict[str, Verdict] = {}
    for claim in document.claims:
        if claim.quantity:
            verdicts[claim.id] = _judge(claim, plan, replan, document)
    for claim in document.claims:
        if claim.subject:
            verdicts[claim.id] = _against_its_subject(verdicts[claim.id], document, verdicts)
    for claim in document.claims:
        if claim.about:
            verdicts[claim.id] = _roll_up(claim, verdicts)
    return [verdicts[claim.id] for claim in document.claims]


def _judge(claim: Claim, plan: Estimate, replan: Replan, document: Document) -> Verdict:
    quantity = QUANTITIES[claim.quantity]
    value = quantity.compute(plan)
    shown = {name: QUANTITIES[name].compute(plan) for name in claim.shows}
    base = f"{quantity.describe(plan)}: {quantity.text(value)}"
    if claim.holds(value) and claim.provided:
        return Verdict(claim, CONDITIONAL, value, base, claim.provided, shown=shown)
    if claim.holds(value):
        return Verdict(claim, CONFIRMED, value, base, shown=shown)
    verdict = Verdict(claim, REFUTED, value, base, shown=shown)
    for name in claim.readings:
        read = QUANTITIES[name].compute(plan)
        if claim.holds(read):
            condition = f"it means {QUANTITIES[name].meaning} ({QUANTITIES[name].text(read)})"
            return replace(verdict, kind=CONDITIONAL, condition=condition)
    for overrides in claim.under:
        if other := _under(verdict, overrides, replan, document):
            return other
    if claim.vary:
        return _solved(verdict, claim.vary, plan)
    return verdict


def _under(verdict: Verdict, overrides: str, replan: Replan, document: Document) -> Verdict | None:
    claim = verdict.claim
    try:
        other = replan(overrides.split())
    except ConfigFaults:
        return None
    for name in (claim.quantity, *claim.readings):
        value = QUANTITIES[name].compute(other)
        if not claim.holds(value):
            continue
        condition = f"{overrides} ({QUANTITIES[name].meaning}: {QUANTITIES[name].text(value)})"
        broken = tuple(
            each.id
            for each in document.claims
            if each.id in claim.against and not each.holds(QUANTITIES[each.quantity].compute(other))
        )
        kind = CONTRADICTS if broken else CONDITIONAL
        return replace(verdict, kind=kind, condition=condition, contradicts=broken)
    return None


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
    if solution.low is None:
        nearest = f"{quantity.text(solution.best)} at {key}={solution.best_at}"
        reason = f"{verdict.reason}; nearest over every {key} that fits the device: {nearest}"
        return replace(verdict, reason=reason)
    condition = f"{key} is {solution.low:,} to {solution.high:,}"
    if claim.hold_tokens:
        condition += ", with batch.micro keeping the tokens of a micro-batch"
    return replace(verdict, kind=CONDITIONAL, condition=condition)


def _against_its_subject(
    verdict: Verdict, document: Document, verdicts: dict[str, Verdict]
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
    stronger = tuple(
        r.id for r in rivals if (rank[verdicts[r.id].kind], _gap(verdicts[r.id])) < mine
    )
    if not stronger:
        return verdict
    return replace(verdict, kind=CONTRADICTS, contradicts=stronger)


def _gap(verdict: Verdict) -> float:
    """How far the plan's own value is from the claim, as a share of it."""
    low, high = verdict.claim.range
    assert verdict.value is not None
    return max(low - verdict.value, verdict.value - high, 0.0) / max(abs(low), 1e-9)


def _roll_up(claim: Claim, verdicts: dict[str, Verdict]) -> Verdict:
    """A claim about other claims, named by id or by the beginning of their ids."""
    rest = [
        verdict
        for name, verdict in verdicts.items()
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


GRID = tuple(2**power for power in range(4, 18))
"""Values tried first: 16 to 131,072, a factor of 2 apart."""


@dataclass(frozen=True)
class Solution:
    """Values from `low` to `high` that confirm the claim, or the nearest that was reached."""

    low: int | None
    high: int | None
    best: float
    """Value of the quantity nearest to the claimed range."""
    best_at: int


def _side(claim: Claim, value: float) -> int:
    low, high = claim.range
    return -1 if value < low else (1 if value > high else 0)


def _distance(claim: Claim, value: float) -> float:
    low, high = claim.range
    return max(low - value, value - high, 0.0)


def solve(claim: Claim, value_at: Callable[[int], float | None], unit: int) -> Solution:
    """Search multiples of `unit` for the first range in which the claim holds.

    Args:
        value_at: the quantity for a value of the key; None where that is not legal.
    """
    known: dict[int, float] = {}

    def evaluate(x: int) -> float | None:
        if x not in known and (value := value_at(x)) is not None:
            known[x] = value
        return known.get(x)

    points = [x for x in sorted({max(g // unit, 1) * unit for g in GRID})
              if evaluate(x) is not None]  # fmt: skip
    for a, b in zip(points, points[1:], strict=False):
        if _side(claim, known[a]) * _side(claim, known[b]) == -1:
            _bisect(claim, evaluate, a, b, unit, 0)
    inside = sorted(x for x, value in known.items() if claim.holds(value))
    if not known:
        return Solution(None, None, float("nan"), 0)
    best_at = min(known, key=lambda x: _distance(claim, known[x]))
    if not inside:
        return Solution(None, None, known[best_at], best_at)
    below = [x for x in known if x < inside[0]]
    above = [x for x in known if x > inside[-1]]
    low, high = inside[0], inside[-1]
    if below:
        low = _bisect(claim, evaluate, max(below), low, unit, 1)
    if above:
        high = _bisect(claim, evaluate, high, min(above), unit, -1)
    return Solution(low, high, known[best_at], best_at)


def _bisect(
    claim: Claim, evaluate: Callable[[int], float | None], a: int, b: int, unit: int, edge: int
) -> int:
    """Narrow [a, b]: to a value inside the range (edge 0), or to the range's edge.

    With edge 1 the range starts in (a, b], with -1 it ends in [a, b); the edge is returned.
    """
    start = _side(claim, evaluate(a) or 0.0)
    while b - a > unit:
        middle = (a + b) // 2 // unit * unit
        middle = min(max(middle, a + unit), b - unit)
        value = evaluate(middle)
        if value is None:
            break
        side = _side(claim, value)
        if edge == 0 and side == 0:
            return middle
        if side == start:
            a = middle
        else:
            b = middle
    return b if edge == 1 else a
