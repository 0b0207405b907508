"""`solve`: the values of an integer key for which a claim holds, by bisection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_train.planner.claims.document import Claim

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
