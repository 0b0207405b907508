"""The search finds what trying everything finds, and keeps what the user fixed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from moe_train.config.compose import compose
from moe_train.config.root import Config
from moe_train.config.schema import value_at, with_values
from moe_train.parallel.layout import divisors
from moe_train.parallel.resolved import vocabulary
from moe_train.parallel.sizes import is_legal, layout_of
from moe_train.planner.cost.timing import step_time
from moe_train.planner.legality import check
from moe_train.planner.memory.stages import plan_memory, worst
from moe_train.planner.plan import BAND, Plan, assumptions_of
from moe_train.planner.resolution import resolve_run
from moe_train.planner.search import best, better_than, candidates
from moe_train.planner.search.candidate import COMFORT

RECOMPUTE = "recompute.layers", "recompute.modules"
POLICIES: list[tuple[str, list[str]]] = [
    ("none", []), ("none", ["moe_act", "layernorm"]), ("none", ["moe_act"]), ("all", []),
]  # fmt: skip
OPTIONS: dict[str, list[Any]] = {
    "parallel.overlap_expert_comm": [False, True],
    "parallel.dispatcher": ["alltoall", "allgather", "flex"],
    "optim.distributed": [True, False],
    "parallel.overlap_grad_reduce": [True, False],
    "parallel.overlap_param_gather": [True, False],
}


def everything(config: Config, world: int, fixed: set[str]) -> Iterator[Config]:
    """Every legal config of the dimensions that are open, by the rules of a launch."""
    chunks = divisors(config.model.layers)
    sizes: dict[str, list[Any]] = {
        **dict.fromkeys(("tensor", "pipeline", "context", "expert", "expert_tensor"),
                        divisors(world)),
        "virtual_pipeline": chunks,
        "placement": ["stage", "span"],
    }  # fmt: skip
    open_sizes = {f"parallel.{name}": values for name, values in sizes.items()}
    for key in open_sizes.keys() & fixed:
        open_sizes[key] = [value_at(config, key)]
    options = {key: values for key, values in OPTIONS.items() if key not in fixed}
    sequences = config.batch.global_ or 0
    micros = divisors(sequences) if "batch.micro" not in fixed else [config.batch.micro]
    policies = POLICIES if "recompute.layers" not in fixed else [
        (config.recompute.layers, config.recompute.modules)]  # fmt: skip
    easy = with_values(
        config, {"parallel.overlap_expert_comm": False, "recompute.layers": "none",
                 "recompute.modules": [], "batch.micro": micros[0]},
    )  # fmt: skip
    for chosen in product(*open_sizes.values()):
        sized = with_values(easy, dict(zip(open_sizes, chosen, strict=True)))
        layout = layout_of(sized, world)
        if not is_legal(with_values(sized, {"parallel.dispatcher": "alltoall"}), layout):
            continue
        for micro, policy, *values in product(micros, policies, *options.values()):
            one = with_values(
                config,
                {
                    **dict(zip(open_sizes, chosen, strict=True)),
                    **dict(zip(options, values, strict=True)),
                    "batch.micro": micro,
                    **dict(zip(RECOMPUTE, policy, strict=True)),
                },
            )
            if not check(one, world):
                yield one


def evaluated(config: Config, world: int) -> tuple[float, float, float]:
    """What candidates are ranked by: the tier, then seconds, or bytes where nothing fits."""
    plan = Plan(
        config, layout_of(config, world), *vocabulary(config), assumptions=assumptions_of(config)
    )
    seconds, size = step_time(plan).step, worst(plan_memory(plan)).total
    share = size / plan.device_bytes
    if share > 1:
        return 2, size, seconds
    return (0 if share <= COMFORT else 1), seconds, size


HARDWARE = ("a100_64gb", "h100_80gb", "cpu", "l4_24gb", "rtx_4090")


def drawn(chance: random.Random) -> tuple[Config, int, set[str]]:
    """A model on some hardware, and the keys that its user fixed."""
    hardware, world = chance.choice(HARDWARE), chance.choice((2, 4))
    args = [
        "experiment=twin",
        "parallel=single",
        "recompute=none",
        f"hardware={hardware}",
        f"device={'cpu' if hardware == 'cpu' else 'cuda'}",
        f"dtype={'fp32' if hardware == 'cpu' else chance.choice(('bf16', 'fp32'))}",
        f"model.layers={chance.choice((2, 4, 6))}",
        f"model.hidden={chance.choice((512, 1024, 4096))}",
        f"model.heads={chance.choice((4, 8, 16))}",
        f"model.experts={chance.choice((4, 8))}",
        f"model.expert_hidden={chance.choice((256, 1024, 4096))}",
        f"data.sequence={chance.choice((128, 1024, 4096))}",
        f"batch.global={chance.choice((4, 8, 16))}",
    ]
    if hardware != "cpu" and chance.random() < 0.3 and "dtype=bf16" in args:
        args += ["optim.distributed=true", "optim.precision_aware=true"]
    config = compose(args)
    # Trying everything takes time: some of the dimensions are fixed in every draw.
    fixed = {key for key in OPTIONS if chance.random() < 0.7}
    fixed |= set(RECOMPUTE) if chance.random() < 0.5 else {"batch.micro"}
    if chance.random() < 0.5:
        fixed.add(chance.choice(("parallel.context", "parallel.expert_tensor")))
    return config, world, fixed


@pytest.mark.parametrize("seed", range(20))
def test_the_first_choice_is_that_of_trying_everything(seed: int) -> None:
    config, world, fixed = drawn(random.Random(seed))
    every = [evaluated(one, world) for one in everything(config, world, fixed)]
    result = best(config, world, fixed=fixed)
    if not every:
        assert result is None
        return
    assert result is not None
    chosen = evaluated(result.config, world)
    assert chosen[:2] == pytest.approx(min(every)[:2], rel=1e-12)
    assert result.seconds == pytest.approx(step_time(result.plan).step)
    for key in fixed:
        size = layout_of(config, world) if key == "parallel.context" else None
        expected = size.context if size else value_at(config, key)
        assert value_at(result.config, key) in (expected, 1 if expected is None else expected)
    assert not check(result.config, world)


def test_a_rival_beats_the_plan_by_more_than_the_band() -> None:
    overrides = ["experiment=moe_30b_8x64gb", "hardware=a100_64gb"]
    given = Plan.of(resolve_run(overrides, 8))
    rival = better_than(given)
    assert rival is not None and rival.fits and rival.plan.tokens == given.tokens
    assert rival.seconds < (1 - BAND) * step_time(given).step
    # Pasted behind the user's overrides they are the rival, and nothing beats that.
    run = resolve_run([*overrides, *rival.overrides(given.config)], 8)
    assert run.layout == rival.layout
    assert step_time(Plan.of(run)).step == pytest.approx(rival.seconds)
    assert better_than(Plan.of(run)) is None


def test_where_nothing_fits_the_smallest_comes_first() -> None:
    config = compose(["experiment=moe_30b_8x64gb", "hardware=l4_24gb", "batch.global=32"])
    result = candidates(config, 8, fixed={"parallel.placement", "parallel.context"}, count=3)
    assert not any(one.fits for one in result)
    assert [one.bytes for one in result] == sorted(one.bytes for one in result)
    assert len({one.layout for one in result}) == 3
    assert {one.layout.placement for one in result} == {"span"}
