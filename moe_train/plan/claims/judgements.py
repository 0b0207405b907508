"""Quantities that compare: spreads, gains of other schedules, what is legal and what is needed."""

from __future__ import annotations

import math
from dataclasses import replace

from moe_train.config.layers import parse_layers
from moe_train.plan.batch import microbatches_per_step
from moe_train.plan.bubbles import bubble
from moe_train.plan.claims.subject import Subject, quantity
from moe_train.plan.communication import gradient_traffic
from moe_train.plan.fit import capacity
from moe_train.plan.links import group
from moe_train.plan.memory import GB
from moe_train.plan.parameters import rank_parameters
from moe_train.plan.rules import layout_faults
from moe_train.plan.sizes import default_expert


def _parameters(s: Subject) -> list[int]:
    block = s.layout.world // s.layout.pipeline
    return [
        rank_parameters(s.config.model, s.layout, stage * block, s.vocab).total
        for stage in range(s.layout.pipeline)
    ]


@quantity("parameters.spread", "of largest", "largest rank's parameters over the smallest's")
def _spread(s: Subject) -> float:
    held = _parameters(s)
    return 1 - min(held) / max(held)


@quantity("parameters.expert_spread", "of largest", "the same, experts alone")
def _expert_spread(s: Subject) -> float:
    return 0.0 if s.config.model.experts % s.layout.expert == 0 else 1.0


@quantity("layout.legal", "yes/no", "whether the layout is legal on these ranks")
def _legal(s: Subject) -> float:
    return float(not any(True for _ in layout_faults(s.config, s.layout)))


@quantity("layout.overlap_legal", "yes/no", "whether expert communication can be overlapped")
def _overlap(s: Subject) -> float:
    parallel = replace(s.config.parallel, overlap_expert_comm=True)
    config = replace(s.config, parallel=parallel)
    return float(not any(True for _ in layout_faults(config, s.layout)))


@quantity("layout.expert_group_inside", "yes/no", "whether an expert group stays on one node")
def _inside(s: Subject) -> float:
    return float(group(s.layout, s.config.hardware, "ep").inside)


@quantity("communication.gradient_gb", "GB", "gradients a rank sends to replicas in a step")
def _gradients(s: Subject) -> float:
    held = rank_parameters(s.config.model, s.layout, 0, s.vocab)
    traffic = gradient_traffic(s.config, s.layout, held)
    return sum(sent.intra + sent.inter for _, kind, sent in traffic if kind != "tp") / GB


def interleaved(s: Subject) -> list[Subject]:
    """Legal interleaved schedules of the same TP and PP, experts inside their stages."""
    inside = s.layout
    if inside.span:
        expert = default_expert(
            "stage", inside.world, inside.tensor, inside.pipeline, 1, inside.experts
        )
        inside = replace(inside, placement="stage", expert=expert)
    found = []
    for chunks in range(2, s.config.model.layers // inside.pipeline + 1):
        layout = replace(inside, virtual_pipeline=chunks)
        parallel = replace(s.config.parallel, placement="stage", virtual_pipeline=chunks)
        config = replace(s.config, parallel=parallel)
        if not any(True for _ in layout_faults(config, layout)):
            found.append(replace(s, config=config, layout=layout))
    return found


@quantity("schedule.gain", "of step", "what the best interleaved schedule saves")
def _schedule_gain(s: Subject) -> float:
    best = min((one.time.step for one in interleaved(s)), default=s.time.step)
    return max(1 - best / s.time.step, 0.0)


@quantity("layout.needed_ranks", "devices", "least number of devices that the sizes need")
def _needed(s: Subject) -> float:
    one = s.layout
    expert = one.expert_tensor * one.expert * (1 if one.span else one.pipeline)
    return math.lcm(one.tensor * one.context * one.pipeline, expert)


@quantity("microbatches.enough", "yes/no", "whether twice as many gain less than 1 % of a step")
def _enough(s: Subject) -> float:
    count = microbatches_per_step(s.config, s.layout.data)
    stages = s.layout.pipeline
    return float(bubble(stages, count) - bubble(stages, 2 * count) < 0.01)


@quantity("expert_cache.needed", "yes/no", "whether experts have to live outside device memory")
def _cache(s: Subject) -> float:
    return float(s.fullest.total > capacity(s.config))


@quantity("router.balances", "yes/no", "whether routing is learnt and balanced")
def _balances(s: Subject) -> float:
    router = s.config.model.router
    return float(router.balancing != "none" or router.expert_bias)


@quantity("recompute.layers", "layers", "layers recomputed whole")
def _recomputed(s: Subject) -> float:
    return len(parse_layers(s.config.recompute.layers, s.config.model.layers))
