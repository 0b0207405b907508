"""Every pipeline schedule is checked, planned, drawn and trained from its one descriptor."""

from __future__ import annotations

import dataclasses

import pytest

from moe_train.config.compose import collect
from moe_train.config.root import Config
from moe_train.features.schedules import SCHEDULES, Pipeline, PipelineSchedule, most_held
from moe_train.parallel.sizes import layout_of
from moe_train.planner.legality import check
from moe_train.planner.plan import Plan
from moe_train.planner.schedule.schedule import build_schedule
from moe_train.testing import layouts
from moe_train.testing.compare import same_bits
from moe_train.testing.layouts import SMALL, Runs
from moe_train.testing.world import run_world
from tests.support.schedules import record_step


def small(one: PipelineSchedule, *overrides: str) -> tuple[Config, list[str]]:
    """PP2 of the twin in the settings that a schedule needs, and the refused fields."""
    arguments = one.needs.split(" with ")[0].split(" and ")
    sizes = ("parallel.pipeline=2", "parallel.expert=null")
    config, faults = collect(["experiment=twin", "parallel=single", *sizes, *arguments, *overrides])
    return config, [fault.field for fault in [*faults, *check(config, 2)]]


@pytest.mark.parametrize("one", SCHEDULES.values(), ids=lambda one: one.name)
def test_descriptor_is_complete(one: PipelineSchedule) -> None:
    sizes = Pipeline(4, 8, 2 if one.chunks else 1)
    held = [one.in_flight(sizes, stage) for stage in range(4)]
    if one.order is not None:
        assert [most_held(one.order(sizes, stage)) for stage in range(4)] == held
    config, _ = small(one)
    layout = layout_of(config, 2)
    drawn = build_schedule(Plan(config, layout, 512), one.name)
    assert drawn.kind == one.name and max(drawn.held) <= max(held) and drawn.timing.step > 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_descriptor_is_legal_by_name_where_it_fits(name: str) -> None:
    one = SCHEDULES[name]
    assert small(one, f"parallel.schedule={name}")[1] == []
    for other in SCHEDULES.values():
        if (other.chunks, other.span) != (one.chunks, one.span):
            assert "parallel.schedule" in small(other, f"parallel.schedule={name}")[1]


def test_a_layout_that_no_schedule_fits_is_refused() -> None:
    assert "parallel.virtual_pipeline" in small(SCHEDULES["span"], "parallel.virtual_pipeline=2")[1]


def test_memory_follows_the_schedule() -> None:
    from moe_train.planner.memory.stages import stage_memory

    config, _ = small(SCHEDULES["1f1b"])
    layout = layout_of(config, 2)
    for name, one in SCHEDULES.items():
        if one.fits(chunks=1, span=False):
            parallel = dataclasses.replace(config.parallel, schedule=name)
            changed = dataclasses.replace(config, parallel=parallel)
            memory = stage_memory(Plan(changed, layout, 512), 1)
            count = changed.batch.microbatches * changed.batch.accumulation
            assert memory.held == one.in_flight(Pipeline(2, count), 1)


@pytest.mark.world
def test_gpipe_holds_all_and_computes_the_same(small_runs: Runs) -> None:
    name = "parallel.schedule=gpipe"
    overrides = [*SMALL, "parallel.pipeline=2", "batch.global=4", name]
    for record in run_world(record_step, 2, overrides):
        sizes = Pipeline(2, 4)
        order = SCHEDULES["gpipe"].order
        assert order is not None
        seen = [(kind, batch) for kind, batch, _ in record.events]
        expected = order(sizes, record.stage)
        assert seen == [(one.direction[0].upper(), one.microbatch) for one in expected]
    two = ("train.steps=2", "optim.decay_steps=20")
    same_bits(small_runs.get(layouts.PP2, name, *two), small_runs.get(layouts.PP2))
