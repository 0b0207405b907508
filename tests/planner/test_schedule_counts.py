"""1F1B holds as few micro-batches as it promises; interleaving follows Megatron's table."""

from __future__ import annotations

import pytest

from moe_train.testing.layouts import SMALL
from moe_train.testing.world import run_world
from tests.support.schedules import StageRecord, record_step

pytestmark = pytest.mark.world


def stages(world: int, *overrides: str) -> list[StageRecord]:
    """Each rank's record of one step."""
    result: list[StageRecord] = run_world(record_step, world, [*SMALL, *overrides])
    return result


@pytest.mark.parametrize(("pipeline", "microbatches"), [(4, 8), (4, 3), (2, 4)])
def test_stage_holds_no_more_than_its_distance_to_the_end(pipeline: int, microbatches: int) -> None:
    result = stages(pipeline, f"parallel.pipeline={pipeline}", f"batch.global={microbatches}")
    assert [record.stage for record in result] == list(range(pipeline))
    for record in result:
        assert len(record.events) == 2 * microbatches
        assert len(set(record.events)) == 2 * microbatches
        # Equal, not only at most: a hook that never fires would pass "at most".
        assert record.most_in_flight == min(microbatches, pipeline - record.stage), record.events


def test_recompute_holds_no_more() -> None:
    overrides = ("parallel.pipeline=2", "batch.global=4", "recompute=all")
    assert [record.most_in_flight for record in stages(2, *overrides)] == [2, 1]


@pytest.mark.parametrize("microbatches", [4, 6])
def test_interleaved_order_is_megatrons_table(microbatches: int) -> None:
    overrides = (
        "parallel.pipeline=2",
        "parallel.virtual_pipeline=2",
        f"batch.global={microbatches}",
    )
    for record in stages(2, *overrides):
        assert len(record.expected) == 2 * 2 * microbatches
        assert record.events == record.expected
        # Interleaving pays its smaller bubble with more in flight: the count above can exceed.
        assert record.most_in_flight > 2 - record.stage
