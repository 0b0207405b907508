"""The counting of cells itself: gaps, overlaps and disagreement are seen."""

from __future__ import annotations

import pytest

from moe_train.testing.world import run_world

# (place, corner, size) of the parts of one [2, 4, 6] tensor.
WHOLE = [((0,), (0, 0), (4, 6)), ((1,), (0, 0), (2, 6)), ((1,), (2, 0), (2, 6))]
FAULTS = {
    "gap": WHOLE[:2],
    "overlap": [*WHOLE, ((1,), (1, 0), (2, 6))],
    "outside": [*WHOLE[:2], ((1,), (3, 0), (2, 6))],
}


def count(rank: int, world: int, parts: list[tuple[tuple[int, ...], ...]], shape: tuple) -> int:
    from tests.support.shards import Matrix, whole_model

    held = [{Matrix("w", (2, 4, 6), *part, "bf16")} for part in parts]
    # A replica, and a vector beside it.
    return whole_model([*held, held[0], {Matrix("n", shape, (0,), (0,), (5,), "bf16")}])


def test_replicas_count_once() -> None:
    assert run_world(count, 1, WHOLE, (1, 5)) == [48 + 5]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str) -> None:
    with pytest.raises(AssertionError, match="w: |outside|Matrix|assert"):
        run_world(count, 1, FAULTS[fault], (1, 5))
