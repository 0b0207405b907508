"""Functions behind the quantities that compare: ranks with each other, other schedules, layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from moe_train.config.root import Config
from moe_train.config.schema import dotted_keys, value_at
from moe_train.parallel.groups import deployment
from moe_train.parallel.layout import GROUPS, Layout, divisors
from moe_train.parallel.sizes import is_legal
from moe_train.planner.cost.communication import gradient_traffic
from moe_train.planner.cost.links import group
from moe_train.planner.estimate import GB, Estimate
from moe_train.planner.search import Candidate, better_than, search_of

EFFORT = 600
"""Step times after which a search for any better plan is content with the best so far."""


def parameter_spread(s: Estimate) -> float:
    """Difference between the largest and the smallest rank's parameters, as a share."""
    held = [s.parameters(stage).total for stage in range(s.layout.pipeline)]
    return 1 - min(held) / max(held)


def overlap_legal(s: Estimate) -> float:
    """Whether expert communication can be overlapped."""
    parallel = replace(s.config.parallel, overlap_expert_comm=True)
    return float(is_legal(replace(s.config, parallel=parallel), s.layout))


def gradient_gb(s: Estimate) -> float:
    """Gradients that a rank sends to replicas in a step."""
    traffic = gradient_traffic(s.config, s.layout, s.parameters(0))
    return sum(sent.intra + sent.inter for _, kind, sent in traffic if kind != "tp") / GB


class Schedules(NamedTuple):
    """The fastest plans that a search finds with one model chunk a stage, and with several."""

    plain: Candidate | None
    interleaved: Candidate | None


def schedules(s: Estimate) -> Schedules:
    """1F1B and interleaved 1F1B of the plan's TP, PP, context parallelism and batch.

    Experts are inside their stages, so that both exist; every other option is the search's, since
    what suits one schedule (overlap, recomputation) may be illegal with the other.
    """
    sizes, layout = ("tensor", "pipeline", "context", "virtual_pipeline", "placement"), s.layout
    fixed = {f"parallel.{name}" for name in sizes}

    def fastest(chunks: int) -> Candidate | None:
        parallel = replace(s.config.parallel, placement="stage", virtual_pipeline=chunks)
        config = replace(_same_batch(s), parallel=parallel)
        search = search_of(config, layout.world, fixed, s.assumptions)
        return next(iter(search.explore(1, effort=EFFORT).ranked), None)

    if layout.pipeline == 1:
        return Schedules(None, None)
    chunks = divisors(s.config.model.layers // layout.pipeline)[1:]
    best = min(filter(None, map(fastest, chunks)), key=lambda one: one.rank, default=None)
    return Schedules(fastest(1), best)


def best_schedule(s: Estimate) -> str:
    """Overrides of the fastest interleaved schedule."""
    best = once(s, schedules).interleaved
    return " ".join(best.overrides(s.config)) if best else ""


def schedule_gain(s: Estimate) -> float | None:
    """Share of a step that the best interleaved schedule saves over plain 1F1B.

    None where one of the two cannot run: then there is nothing to compare.
    """
    plain, best = once(s, schedules)
    if plain is None or best is None:
        return None
    return max(1 - best.seconds / plain.seconds, 0.0)


def needed_ranks(layout: Layout, expert_stages: int) -> float:
    """Least number of ranks for the layout's sizes, by the stages that have their own experts."""
    expert = layout.expert_tensor * layout.expert * expert_stages
    return math.lcm(layout.tensor * layout.context * layout.pipeline, expert)


def covered_layers(s: Estimate) -> float:
    """Layers that the stages' lists cover exactly once."""
    dealt = [n for stage in range(s.layout.pipeline) for n in s.layout.stage_layers(stage)]
    return float(len(set(dealt))) if len(dealt) == len(set(dealt)) else 0.0


def placed_modules(s: Estimate) -> float:
    """Expert modules that the plan's map places."""
    placed = deployment(s.layout)["modules"]
    return float(len({(one["layer"], one["expert"]) for one in placed}))


def has_patterns(s: Estimate) -> float:
    """Whether every group of more than one rank has its communication pattern."""
    kinds = [
        kind
        for kind in ("tp", "cp", "pp", "dp_cp", "ep", "etp", "edp")
        if group(s.layout, s.config.hardware, kind).size > 1
    ]
    return float(bool(kinds) and all(GROUPS[kind].traffic for kind in kinds))


def deployment_complete(s: Estimate) -> float:
    """Whether the plan has all that a graph of the step needs."""
    model = s.config.model
    placed = placed_modules(s) == model.layers * model.experts and covered_layers(s) == model.layers
    return float(placed and has_patterns(s) == 1.0 and s.time.step > 0)


STRATEGIES = (
    "recompute.layers", "batch.accumulation", "parallel.overlap_expert_comm",
    "parallel.dispatcher", "parallel.placement", "model.router.balancing", "data.sequence",
)  # fmt: skip
"""Config keys of the strategies that section 5 names; a run's folder holds all of them."""


def states_strategies(s: Estimate) -> float:
    """Whether the resolved config states every strategy that runs."""
    known = dotted_keys(Config)
    return float(all(k in known and value_at(s.config, k) is not None for k in STRATEGIES))


def _same_batch(s: Estimate) -> Config:
    """The plan's config with its sequences a step fixed, whatever the number of replicas."""
    return replace(s.config, batch=replace(s.config.batch, global_=s.sequences))


def better(s: Estimate) -> Candidate | None:
    """A layout that fits and beats the plan by more than the band, or None."""
    return better_than(s, EFFORT) or better_than(s)


def better_overrides(s: Estimate) -> str:
    """Overrides that make the plan the `better` one."""
    best = once(s, better)
    return " ".join(best.overrides(s.config)) if best else ""


def layout_gain(s: Estimate) -> float | None:
    """Share of a step that another layout saves: the `better` one, or the best of a search.

    None where no other layout fits: without a rival nothing is optimal. A plan that does not fit
    loses all of its time to one that does.
    """
    if best := once(s, better):
        return 1 - best.seconds / s.time.step if s.fits else 1.0
    search = search_of(_same_batch(s), s.layout.world, assumptions=s.assumptions)
    rivals = [one for one in search.explore(2).ranked if one.layout != s.layout]
    if not rivals or not s.fits:
        return None
    return max(1 - rivals[0].seconds / s.time.step, 0.0)


def best_mfu(s: Estimate) -> tuple[float, str] | None:
    """The highest MFU that a search of layouts and options finds for the plan's batch.

    Returns:
        MFU and overrides; None where the plan's own is not beaten by more than the band.
    """
    best = once(s, better)
    if best is None or best.time.mfu is None:
        return None
    return best.time.mfu, " ".join(best.overrides(s.config))


def once[T](s: Estimate, compute: Callable[[Estimate], T]) -> T:
    """``compute(s)``, kept with `s`: searches take seconds, and several quantities read them."""
    known = s.__dict__.setdefault("_compared", {})
    if compute not in known:
        known[compute] = compute(s)
    result: T = known[compute]
    return result
