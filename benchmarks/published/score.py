"""How predictions and published figures agree: error, order, and error of what was not fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from benchmarks.published.predict import predicted_seconds, published_seconds, rate
from benchmarks.published.rows import Entry, entries

APART = 0.10
"""Two runs of one model are in an order where their figures differ by more than this share."""


@dataclass(frozen=True)
class Comparison:
    """One run: what was published beside what is predicted."""

    entry: Entry
    published: float
    """Seconds of a step."""
    predicted: float
    """Seconds of a step."""

    @property
    def log_ratio(self) -> float:
        """Logarithm of predicted over published seconds."""
        return math.log(self.predicted / self.published)

    @property
    def error(self) -> float:
        """Relative error, the same whether of seconds or of a rate: the larger over the smaller,
        less one.
        """
        return math.exp(abs(self.log_ratio)) - 1

    @property
    def published_rate(self) -> float:
        """Model TFLOP/s of a GPU."""
        return rate(self.entry, self.published)

    @property
    def predicted_rate(self) -> float:
        """Model TFLOP/s of a GPU."""
        return rate(self.entry, self.predicted)


@dataclass(frozen=True)
class Score:
    """Of all scored runs together."""

    rows: int
    models: int
    mean: float
    worst: float
    worst_row: str
    pairs: int
    ordered: int

    @property
    def order(self) -> float:
        """Share of the pairs whose order is right."""
        return self.ordered / self.pairs if self.pairs else 1.0


def compare(chosen: Sequence[Entry] | None = None) -> list[Comparison]:
    """All rows, or `chosen` ones, with today's constants."""
    return [
        Comparison(one, published_seconds(one), predicted_seconds(one))
        for one in (entries() if chosen is None else chosen)
    ]


def pairs(compared: Sequence[Comparison]) -> list[tuple[Comparison, Comparison, bool]]:
    """Pairs of one model whose figures are apart, and whether they are predicted in order."""
    result = []
    for a, b in combinations(compared, 2):
        if a.entry.run.model != b.entry.run.model:
            continue
        ahead = math.log(a.published_rate / b.published_rate)
        if abs(ahead) > math.log(1 + APART):
            predicted = math.log(a.predicted_rate / b.predicted_rate)
            result.append((a, b, ahead * predicted > 0))
    return result


def score(compared: Sequence[Comparison]) -> Score:
    """The score of what is compared, of scored rows alone."""
    judged = [one for one in compared if one.entry.run.scored]
    worst = max(judged, key=lambda one: one.error)
    order = pairs(judged)
    return Score(
        rows=len(judged),
        models=len({one.entry.run.model for one in judged}),
        mean=sum(one.error for one in judged) / len(judged),
        worst=worst.error,
        worst_row=worst.entry.run.id,
        pairs=len(order),
        ordered=sum(right for _, _, right in order),
    )
