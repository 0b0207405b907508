"""What a search leaves out is slower than what it keeps, and large worlds take little effort."""

from __future__ import annotations

import random

import pytest

from moe_train.config.compose import compose
from moe_train.planner.cost.timing import step_time
from moe_train.planner.search import search_of
from moe_train.planner.search.explore import LISTED

MODELS = (
    ["experiment=moe_30b_8x64gb", "hardware=a100_64gb"],
    ["model=qwen3_30b_a3b", "hardware=h100_80gb", "batch.global=64"],
    ["experiment=twin", "hardware=cpu", "device=cpu", "dtype=fp32"],
)


@pytest.mark.parametrize("overrides", MODELS, ids=lambda args: args[0])
@pytest.mark.parametrize("world", [8, 64])
def test_no_step_is_faster_than_its_bounds(overrides: list[str], world: int) -> None:
    search = search_of(compose(overrides), world)
    chance = random.Random(world)
    layouts = [*search.space.layouts()]
    checked = 0
    for layout in chance.sample(layouts, min(len(layouts), 40)):
        micro = chance.choice(search.space.micros(layout))
        options = [*search.space.options(layout, micro)]
        for one in chance.sample(options, min(len(options), 8)):
            seconds = step_time(search.plan(layout, one)).step * (1 + 1e-9)
            exchange = one.overlap, one.dispatcher
            bounds = search.bounds
            precise = bounds.of(layout, micro, exchange, distributed=one.distributed)
            assert bounds.with_update(layout, micro) <= precise * (1 + 1e-9)
            assert bounds.least(layout, micro) <= seconds
            assert precise <= seconds
            checked += 1
    assert checked > 20


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=moe_30b_8x64gb", "hardware=h100_80gb", "batch.global=65536"],
        ["model=qwen3_30b_a3b", "hardware=h100_80gb", "batch.global=16384"],
    ],
    ids=lambda args: args[0],
)
def test_a_search_on_16384_ranks_computes_few_step_times(overrides: list[str]) -> None:
    search = search_of(compose(overrides), 16384)
    first = search.explore(5).ranked
    assert len(first) == 5 and first[0].fits
    assert search.evaluated < 1000
    # The frontier costs at most what is allowed for it, and leaves the first choice as it is.
    listed = search_of(search.space.config, 16384)
    assert listed.explore(5, pareto=True).ranked[0].config == first[0].config
    assert listed.evaluated < 1000 + LISTED
