"""The 30 B at full size, every rank of every reading of the mission, on fake tensors."""

from __future__ import annotations

import pytest

from moe_train.testing.world import run_world

TOTAL = 30_063_481_344
STAGE = "parallel.placement=stage"
# The five legal readings of "EP=8 x TP=2 x PP=4 on 8 devices", by layout tag.
READINGS = {
    "TP2.PP4.EP8.span": ("moe_30b_8x64gb", 8, ["parallel.placement=span"]),
    "TP2.PP4.EP2": ("moe_30b_8x64gb", 8, [STAGE, "parallel.expert=2"]),
    "TP2.PP4.ETP2": (
        "moe_30b_8x64gb",
        8,
        [STAGE, "parallel.expert=1", "parallel.expert_tensor=2"],
    ),
    "TP2.EP8": ("moe_30b_8x64gb", 8, ["parallel=tp2_ep8", STAGE]),
    "TP2.PP4.EP8": ("moe_30b_32x64gb", 32, [STAGE]),
}


def overrides(reading: str) -> tuple[list[str], int]:
    experiment, world, sizes = READINGS[reading]
    return [f"experiment={experiment}", *sizes], world


def count_ranks(
    rank: int, one: int, args: list[str], world: int
) -> tuple[str, int, list[tuple[int, int]]]:
    """Layout tag, distinct parameters of all ranks, and (built, planned) for each rank."""
    from moe_train.backend.cpu.backend import CpuBackend
    from moe_train.measure.dryrun.world import fake_world
    from moe_train.parallel.parameters import rank_parameters
    from moe_train.planner.resolution import resolve_run
    from tests.support.chunks import fake_chunks, parameter_count
    from tests.support.shards import matrices, whole_model

    run = resolve_run(args, world)
    config, layout = run.config, run.layout
    backend = CpuBackend(config.backend)
    counts, parts = [], []
    for each in range(world):
        with fake_world(each, world):
            chunks = fake_chunks(run, backend)
            assert config.model.vocab
            planned = rank_parameters(config.model, layout, each, config.model.vocab).total
            counts.append((parameter_count(chunks), planned))
            parts.append(matrices(chunks))
    return layout.tag, whole_model(parts), counts


@pytest.mark.world
@pytest.mark.parametrize("reading", READINGS)
def test_every_rank_is_built_as_planned(reading: str) -> None:
    arguments, world = overrides(reading)
    [(tag, total, counts)] = run_world(count_ranks, 1, arguments, world)
    assert tag == reading
    assert total == TOTAL
    assert len(counts) == world
    wrong = {rank: both for rank, both in enumerate(counts) if both[0] != both[1]}
    assert not wrong, f"(built, planned) by rank: {wrong}"


@pytest.mark.world
def test_rank_0_of_the_mission() -> None:
    arguments, world = overrides("TP2.PP4.EP2")
    [(_, _, counts)] = run_world(count_ranks, 1, arguments, world)
    assert counts[0][0] == 3_816_493_056
