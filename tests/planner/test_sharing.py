"""Ranks that queue for cores, against the Markov chain itself and against their own limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.planner.cost.sharing import shared_seconds


def by_the_chain(ranks: int, cores: int, busy: float, waiting: float) -> float:
    """The same from the stationary distribution of the generator matrix, solved as it stands."""
    rates = np.zeros((ranks + 1, ranks + 1))
    for here in range(ranks):
        rates[here, here + 1] = (ranks - here) / waiting
        rates[here + 1, here] = min(here + 1, cores) / busy
    rates -= np.diag(rates.sum(axis=1))
    equations = np.vstack([rates.T, np.ones(ranks + 1)])
    share, *_ = np.linalg.lstsq(equations, np.append(np.zeros(ranks + 1), 1.0), rcond=None)
    ended = sum(share[here] * min(here, cores) / busy for here in range(ranks + 1))
    return ranks / ended


@pytest.mark.parametrize("ranks, cores", [(4, 2), (8, 2), (3, 1), (16, 5)])
@pytest.mark.parametrize("waiting", [0.05, 0.9, 20.0])
def test_the_formula_is_the_chain(ranks: int, cores: int, waiting: float) -> None:
    alone = 1.1 + waiting
    assert shared_seconds(ranks, cores, 1.1, alone, variation=1.0) == pytest.approx(
        by_the_chain(ranks, cores, 1.1, waiting), rel=1e-6
    )


def test_limits() -> None:
    assert shared_seconds(2, 2, 0.5, 1.0) == 1.0
    assert shared_seconds(8, 2, 1.0, 1.0) == 4.0
    assert shared_seconds(8, 2, 0.0, 1.0) == 1.0
    # Far more work than cores: they are never idle.
    assert shared_seconds(5000, 2, 1.0, 5.0) == pytest.approx(2500.0, rel=1e-9)


@given(st.integers(1, 64), st.integers(1, 16), st.floats(1e-6, 1e3), st.floats(0.0, 1e3))
def test_never_faster_than_alone_or_than_the_cores(
    ranks: int, cores: int, busy: float, waiting: float
) -> None:
    alone = busy + waiting
    seconds = shared_seconds(ranks, cores, busy, alone)
    least = max(alone, ranks * busy / cores)
    assert least * (1 - 1e-9) <= seconds
    # No more than a greedy schedule at its worst (Graham, 1969).
    assert seconds <= (ranks * busy / cores + alone) * (1 + 1e-9)


def test_regular_times_queue_for_less() -> None:
    least, most = 2.0, shared_seconds(4, 2, 0.6, 2.0, variation=1.0)
    results = [shared_seconds(4, 2, 0.6, 2.0, variation) for variation in (0.0, 0.25, 0.5, 1.0)]
    assert results == sorted(results) and results[-1] == most
    assert (results[0] - least) / (most - least) == pytest.approx(0.5)
