"""Batches: every layout sees the same samples in the same step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.batches import KEYS, BatchSource
from moe_train.errors import ConfigError


class Numbers:
    """Sample i is made of the number i."""

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: torch.full((4,), index) for key in KEYS}


def taken(source: BatchSource) -> list[list[int]]:
    step = source.next_step()
    assert all(set(batch) == set(KEYS) for batch in step)
    return [batch["tokens"][:, 0].tolist() for batch in step]


@given(
    micro=st.integers(1, 3),
    size=st.integers(1, 5),
    microbatches=st.integers(1, 4),
    steps=st.integers(1, 3),
    consumed=st.integers(0, 1000),
)
def test_ranks_together_take_every_sample_once(
    micro: int, size: int, microbatches: int, steps: int, consumed: int
) -> None:
    total = micro * size * microbatches
    ranks = [BatchSource(Numbers(), total, micro, r, size, consumed) for r in range(size)]
    for step in range(steps):
        results = [taken(rank) for rank in ranks]
        assert all(len(rank) == microbatches for rank in results)
        # Micro-batch by micro-batch over the ranks is the dataset's own order.
        flat = [i for m in range(microbatches) for rank in results for i in rank[m]]
        start = consumed + step * total
        assert flat == list(range(start, start + total))
        assert {rank.consumed for rank in ranks} == {start + total}


@given(before=st.integers(0, 4), size=st.sampled_from([1, 2, 4]), later=st.sampled_from([1, 2, 4]))
def test_continued_in_another_layout(before: int, size: int, later: int) -> None:
    first = BatchSource(Numbers(), 8, 1, 0, size)
    for _ in range(before):
        first.next_step()
    ranks = [BatchSource(Numbers(), 8, 2, r, later, first.consumed) for r in range(later)]
    result = sorted(i for rank in ranks for batch in taken(rank) for i in batch)
    assert result == list(range(8 * before, 8 * before + 8))


def test_shapes_and_iteration() -> None:
    source = BatchSource(Numbers(), 12, 2, 1, 3)
    step = source.next_step()
    assert source.microbatches == len(step) == 2
    assert all(value.shape == (2, 4) for batch in step for value in batch.values())
    assert (source.consumed, source.indices()) == (12, [[14, 15], [20, 21]])


@pytest.mark.parametrize(("total", "near"), [(10, 8), (0, 4), (15, 16)])
def test_batch_that_does_not_divide(total: int, near: int) -> None:
    with pytest.raises(ConfigError, match=f"batch.global.*\n.*nearest: {near}"):
        BatchSource(Numbers(), total, 2, 0, 2)
