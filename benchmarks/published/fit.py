"""The fit of the cost model's constants to the scored rows, and the error of rows left out.

Non-linear least squares on the logarithm of predicted over published seconds (scipy's
``least_squares``), robust to outliers (soft l1). Every model weighs the same, however many of its
runs are published. Leaving one row or one model out, the constants follow by Gauss-Newton steps
from the fit to all rows, which is their fit to the rest where the model is close to linear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from benchmarks.published.rows import Entry
from benchmarks.published.score import Comparison, compare
from moe_train.planner.cost import constants as cost

Vector = NDArray[np.float64]
SCALE = 0.15
"""Residual from which a row counts as an outlier: the band of a prediction."""
STEP = 0.02
"""Relative step of the numerical derivatives."""


@dataclass(frozen=True)
class LeftOut:
    """A group of rows predicted by constants that were fitted to the others."""

    name: str
    compared: list[Comparison]

    @property
    def mean(self) -> float:
        """Mean error of the group."""
        return sum(one.error for one in self.compared) / len(self.compared)


def names() -> list[str]:
    """The fitted constants."""
    return list(cost.BOUNDS)


def start() -> Vector:
    """Their values now."""
    now = asdict(cost.CONSTANTS)
    return np.array([now[name] for name in names()])


def with_values(values: Vector) -> cost.Constants:
    """The constants at `values`."""
    return cost.Constants(**dict(zip(names(), map(float, values), strict=True)))


def weights(rows: Sequence[Entry]) -> Vector:
    """Of each row's residual, so that every model has the same sum of squares."""
    count = Counter(one.run.model for one in rows)
    return np.array([count[one.run.model] ** -0.5 for one in rows])


def residuals(rows: Sequence[Entry], values: Vector) -> Vector:
    """Logarithms of predicted over published seconds, unweighted."""
    with cost.using(with_values(values)):
        return np.array([one.log_ratio for one in compare(rows)])


def bounds() -> tuple[Vector, Vector]:
    """Between which the constants make sense."""
    low, high = zip(*(cost.BOUNDS[name] for name in names()), strict=True)
    return np.array(low), np.array(high)


def fit(rows: Sequence[Entry], first: Vector | None = None) -> Vector:
    """The constants that fit `rows` best."""
    share = weights(rows)
    low, high = bounds()
    begin = np.clip(start() if first is None else first, low, high)
    found = least_squares(
        lambda values: residuals(rows, values) * share,
        begin,
        bounds=(low, high),
        x_scale=np.maximum(np.abs(begin), 0.1),
        diff_step=STEP,
        loss="soft_l1",
        f_scale=SCALE,
        xtol=1e-3,
        ftol=1e-4,
    )
    return np.asarray(found.x, dtype=np.float64)


def jacobian(rows: Sequence[Entry], values: Vector) -> tuple[Vector, Vector]:
    """Residuals at `values`, and their derivatives by each constant."""
    here = residuals(rows, values)
    low, high = bounds()
    columns = []
    for index, value in enumerate(values):
        step = STEP * max(abs(value), 0.1)
        step = -step if value + step > high[index] else step
        moved = values.copy()
        moved[index] = max(value + step, low[index])
        columns.append((residuals(rows, moved) - here) / (moved[index] - value))
    return here, np.stack(columns, axis=1)


def left_out(rows: Sequence[Entry], values: Vector, group: Callable[[Entry], str]) -> list[LeftOut]:
    """Every group of `rows` predicted by constants that did not see it."""
    here, slopes = jacobian(rows, values)
    share = weights(rows)
    low, high = bounds()
    # Soft l1 as weights of the residuals at the fit (iteratively reweighted least squares).
    robust = share * (1 + (here * share / SCALE) ** 2) ** -0.25
    groups = sorted({group(one) for one in rows})
    result = []
    for name in groups:
        kept = np.array([group(one) != name for one in rows])
        matrix, right = slopes[kept] * robust[kept, None], -here[kept] * robust[kept]
        step = np.linalg.lstsq(matrix, right, rcond=1e-3)[0]
        moved = np.clip(values + step, low, high)
        with cost.using(with_values(moved)):
            compared = compare([one for one in rows if group(one) == name])
        result.append(LeftOut(name, compared))
    return result
