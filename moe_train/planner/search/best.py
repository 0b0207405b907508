"""What the rest of the planner asks a search: the best candidates, a better layout."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import inf

from moe_train.config.root import Config
from moe_train.parallel.shapes import Assumptions
from moe_train.planner.cost.timing import step_time
from moe_train.planner.plan import BAND, Plan
from moe_train.planner.search.candidate import Candidate, bytes_needed
from moe_train.planner.search.explore import Search
from moe_train.planner.search.space import Space


def search_of(
    config: Config,
    world: int,
    fixed: Collection[str] = (),
    assumptions: Assumptions | None = None,
) -> Search:
    """The search for `config` on `world` ranks, with the sequences of its own step.

    Args:
        config: its sizes that `fixed` does not name are ignored, set or not.
        fixed: keys of the config that keep their values.
        assumptions: of all plans; None takes those of the hardware's kernels.
    """
    if config.batch.global_ is None:
        sizes = config.parallel
        dense = (sizes.tensor or 1) * (sizes.pipeline or 1) * (sizes.context or 1)
        sequences = config.batch.sequences(max(world // dense, 1))
        config = replace(config, batch=replace(config.batch, global_=sequences))
    return Search(Space(config, world, frozenset(fixed)), assumptions)


def candidates(
    config: Config,
    world: int,
    *,
    fixed: Collection[str] = (),
    count: int = 5,
    assumptions: Assumptions | None = None,
) -> list[Candidate]:
    """The `count` best layouts, each with its best options; the first is the choice.

    All have the tokens of `config`'s own step. Where nothing fits, the smallest; empty where
    nothing is legal. Arguments are those of `search_of`.
    """
    search = search_of(config, world, fixed, assumptions)
    return search.explore(count).ranked or search.smallest(count)


def best(
    config: Config,
    world: int,
    *,
    fixed: Collection[str] = (),
    assumptions: Assumptions | None = None,
) -> Candidate | None:
    """The first of `candidates`; None where nothing is legal."""
    results = candidates(config, world, fixed=fixed, count=1, assumptions=assumptions)
    return results[0] if results else None


def better_than(plan: Plan, effort: float = inf) -> Candidate | None:
    """A candidate that fits and beats `plan` by more than the band, the best one; None without.

    Beside a plan that does not fit, any candidate that does is better.

    Args:
        effort: step times to compute; with a limit the best one may be missed.
    """
    fits = bytes_needed(plan) <= plan.device_bytes
    below = step_time(plan).step * (1 - BAND) if fits else inf
    config = replace(plan.config, batch=replace(plan.config.batch, global_=plan.sequences))
    search = search_of(config, plan.layout.world, assumptions=plan.assumptions)
    results = search.explore(1, below=below, effort=effort).ranked
    return results[0] if results else None
