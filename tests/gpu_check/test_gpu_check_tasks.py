"""Measures of the GPU check that need several ranks."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.gpu_check.tasks import exchange
from moe_train.testing.world import run_world


def _exchanged(rank: int, world: int) -> list[dict[str, Any]]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rows = exchange.measure("cpu", exchange.TINY)
    dist.destroy_process_group()
    return rows


@pytest.mark.world
def test_an_exchange_among_three_ranks_has_sizes_that_they_can_share() -> None:
    rows = run_world(_exchanged, 3)[0]
    assert [row["bytes"] for row in rows] == [4095, 16383]
    assert all(row["gb_per_second"] > 0 for row in rows)
