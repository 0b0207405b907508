"""Functions behind the quantities that compare: other schedules and layouts, what is installed."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from moe_train.config.root import Config
from moe_train.config.schema import dotted_keys, value_at
from moe_train.config.training import BackendConfig
from moe_train.parallel.groups import deployment
from moe_train.parallel.layout import GROUPS, Layout
from moe_train.parallel.sizes import default_expert, is_legal, legal_layouts, with_layout
from moe_train.planner.cost.communication import gradient_traffic
from moe_train.planner.cost.links import group
from moe_train.planner.estimate import GB, Estimate
from moe_train.planner.memory.fit import fits
from moe_train.planner.ranking import ranked


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


def interleaved(s: Estimate) -> list[Estimate]:
    """Legal 1F1B schedules of the same TP and PP that fit, by model chunks, one chunk first;
    experts inside their stages, so that only the schedule differs."""
    inside = s.layout
    if inside.span:
        expert = default_expert(
            "stage", inside.world, inside.tensor, inside.pipeline, 1, inside.experts
        )
        inside = replace(inside, placement="stage", expert=expert)
    schedules = []
    for chunks in range(1, s.config.model.layers // inside.pipeline + 1):
        layout = replace(inside, virtual_pipeline=chunks)
        parallel = replace(s.config.parallel, placement="stage", virtual_pipeline=chunks)
        config = replace(s.config, parallel=parallel)
        if is_legal(config, layout):
            schedules.append(replace(s, config=config, layout=layout))
    return [one for one in schedules if fits(one)]


def best_schedule(s: Estimate) -> Estimate:
    """The fastest of the `interleaved` schedules."""
    return min(interleaved(s), key=lambda one: one.time.step, default=s)


def schedule_gain(s: Estimate) -> float:
    """Share of a step that the best interleaved schedule saves over plain 1F1B."""
    plain = next((one for one in interleaved(s) if one.layout.virtual_pipeline == 1), s)
    return max(1 - best_schedule(s).time.step / plain.time.step, 0.0)


def needed_ranks(layout: Layout, expert_stages: int) -> float:
    """Least number of ranks for the layout's sizes, by the stages that have their own experts."""
    expert = layout.expert_tensor * layout.expert * expert_stages
    return math.lcm(layout.tensor * layout.context * layout.pipeline, expert)


def has_module(name: str) -> float:
    """Whether a module of this package exists."""
    # find_spec imports the parent packages only, which here hold nothing but a docstring.
    return float(find_spec(name) is not None)


def has_nccl_settings() -> float:
    """Whether NCCL settings are part of the config."""
    return float("nccl" in {one.name for one in dataclasses.fields(BackendConfig)})


def tensor_parallel_works(s: Estimate) -> float:
    """Whether Megatron-Core is installed and TP is legal."""
    try:
        version("megatron-core")
    except PackageNotFoundError:
        return 0.0
    return float(s.config.model.heads % s.layout.tensor == 0)


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


def fastest(s: Estimate) -> Layout:
    """The layout of these ranks with the shortest predicted step, any placement."""
    config, layouts = _same_batch(s), []
    for placement in ("stage", "span"):
        free = replace(
            config.parallel, tensor=None, pipeline=None, expert=None, placement=placement
        )
        layouts += legal_layouts(replace(config, parallel=free), s.layout.world)
    return ranked(config, layouts)[0]


def fastest_overrides(s: Estimate) -> str:
    """Overrides that choose the `fastest` layout with the same batch."""
    return " ".join([*fastest(s).overrides(), f"batch.global={s.sequences}"])


def layout_gain(s: Estimate) -> float:
    """Share of a step that the `fastest` layout saves."""
    best = fastest(s)
    other = replace(s, config=with_layout(_same_batch(s), best), layout=best)
    return max(1 - s.time.tokens_per_second / other.time.tokens_per_second, 0.0)
