"""Quantities that are 1 where this installation has a feature: claims about the product itself."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from moe_train.config.root import Config
from moe_train.config.schema import dotted_keys, value_at
from moe_train.config.training import BackendConfig
from moe_train.parallel.groups import deployment
from moe_train.parallel.layout import GROUPS, Layout
from moe_train.parallel.sizes import legal_layouts, with_layout
from moe_train.planner.claims.subject import Subject, quantity
from moe_train.planner.cost.links import group
from moe_train.planner.search import ranked


def _module(name: str) -> float:
    # find_spec imports the parent packages only, which here hold nothing but a docstring.
    return float(find_spec(name) is not None)


@quantity("feature.megatron_tensor_parallel", "yes/no", "Megatron-Core is installed, TP is legal")
def _megatron(s: Subject) -> float:
    try:
        version("megatron-core")
    except PackageNotFoundError:
        return 0.0
    return float(s.config.model.heads % s.layout.tensor == 0)


@quantity("feature.expert_parallel", "yes/no", "experts over stages are this project's own module")
def _experts(s: Subject) -> float:
    return _module("moe_train.model.span.dispatcher") if s.layout.span else 1.0


@quantity("feature.nccl", "yes/no", "NCCL settings are part of the config")
def _nccl(_: Subject) -> float:
    return float("nccl" in {one.name for one in dataclasses.fields(BackendConfig)})


@quantity("feature.expert_monitoring", "yes/no", "tokens of every expert are recorded each step")
def _monitoring(_: Subject) -> float:
    return _module("moe_train.train.router_stats")


@quantity("feature.packed_sequences", "yes/no", "samples are packed to one length")
def _packing(_: Subject) -> float:
    return _module("moe_train.data.datasets")


@quantity("feature.batched_exchange", "yes/no", "tokens of all experts of a rank travel together")
def _batched(s: Subject) -> float:
    return float(group(s.layout, s.config.hardware, "ep").size > 1)


@quantity("deployment.layers", "layers", "layers that the stages' lists cover exactly once")
def _layers(s: Subject) -> float:
    dealt = [n for stage in range(s.layout.pipeline) for n in s.layout.stage_layers(stage)]
    return float(len(set(dealt))) if len(dealt) == len(set(dealt)) else 0.0


@quantity("deployment.modules", "modules", "expert modules that the plan's map places")
def _modules(s: Subject) -> float:
    placed = deployment(s.layout)["modules"]
    return float(len({(one["layer"], one["expert"]) for one in placed}))


@quantity("deployment.patterns", "yes/no", "every group of more than one rank has its pattern")
def _patterns(s: Subject) -> float:
    kinds = [kind for kind in ("tp", "cp", "pp", "dp_cp", "ep", "etp", "edp")
             if group(s.layout, s.config.hardware, kind).size > 1]  # fmt: skip
    return float(bool(kinds) and all(GROUPS[kind].traffic for kind in kinds))


@quantity("deployment.complete", "yes/no", "the plan has all that a graph of the step needs")
def _complete(s: Subject) -> float:
    whole = s.config.model.layers * s.config.model.experts
    placed = _modules(s) == whole and _layers(s) == s.config.model.layers
    return float(placed and _patterns(s) == 1.0 and s.time.step > 0)


STRATEGIES = (
    "recompute.layers", "batch.accumulation", "parallel.overlap_expert_comm",
    "parallel.dispatcher", "parallel.placement", "model.router.balancing", "data.sequence",
)  # fmt: skip
"""Config keys of the strategies that section 5 names; a run's folder keeps all of them."""


@quantity("deployment.strategies", "yes/no", "the resolved config states every strategy that runs")
def _strategies(s: Subject) -> float:
    known = dotted_keys(Config)
    return float(all(k in known and value_at(s.config, k) is not None for k in STRATEGIES))


def _fastest_overrides(s: Subject) -> str:
    return " ".join([*fastest(s).overrides(), f"batch.global={s.time.sequences}"])


@quantity("layout.gain", "of time", "what the fastest legal layout that fits saves a step",
          _fastest_overrides)  # fmt: skip
def _gain(s: Subject) -> float:
    best = fastest(s)
    other = replace(s, config=with_layout(_same_batch(s), best), layout=best)
    return max(1 - s.time.tokens_per_second / other.time.tokens_per_second, 0.0)


def _same_batch(s: Subject) -> Config:
    """The plan's config with its sequences a step fixed, whatever the number of replicas."""
    return replace(s.config, batch=replace(s.config.batch, global_=s.time.sequences))


def fastest(s: Subject) -> Layout:
    """The layout of these ranks with the shortest predicted step, any placement."""
    config, found = _same_batch(s), []
    for placement in ("stage", "span"):
        free = replace(
            config.parallel, tensor=None, pipeline=None, expert=None, placement=placement
        )
        found += legal_layouts(replace(config, parallel=free), s.layout.world)
    return ranked(config, found)[0]
