"""Quantities that compare: spreads, gains of other schedules, what is legal and what is needed."""

from __future__ import annotations

import math
from dataclasses import replace

from moe_train.parallel.batch import microbatches_per_step
from moe_train.parallel.layout import Layout
from moe_train.parallel.parameters import rank_parameters
from moe_train.parallel.rules import layout_faults
from moe_train.parallel.sizes import default_expert
from moe_train.planner.claims.subject import Subject, quantity
from moe_train.planner.cost.communication import gradient_traffic
from moe_train.planner.cost.links import group
from moe_train.planner.memory.fit import capacity, fits
from moe_train.planner.memory.stages import GB


def _parameters(s: Subject) -> list[int]:
    block = s.layout.ranks_per_stage
    return [
        rank_parameters(s.config.model, s.layout, stage * block, s.vocab).total
        for stage in range(s.layout.pipeline)
    ]


@quantity(
    "parameters.spread",
    "of largest",
    "difference between the largest and the smallest rank's parameters",
)
def _spread(s: Subject) -> float:
    held = _parameters(s)
    return 1 - min(held) / max(held)


@quantity(
    "parameters.expert_spread", "of largest", "the same difference in experts' parameters alone"
)
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


@quantity("layout.overlap_on", "yes/no", "whether the plan overlaps expert communication")
def _overlap_on(s: Subject) -> float:
    return float(s.config.parallel.overlap_expert_comm and _overlap(s) == 1.0)


@quantity("layout.expert_group_inside", "yes/no", "whether an expert group stays on one node")
def _inside(s: Subject) -> float:
    return float(group(s.layout, s.config.hardware, "ep").inside)


@quantity("communication.accumulation_saves", "of gradient traffic",
          "what accumulating instead of stepping every round saves a token")  # fmt: skip
def _accumulation(s: Subject) -> float:
    return 1 - 1 / s.config.batch.accumulation if _gradients(s) > 0 else 0.0


@quantity("communication.gradient_gb", "GB", "gradients a rank sends to replicas in a step")
def _gradients(s: Subject) -> float:
    held = rank_parameters(s.config.model, s.layout, 0, s.vocab)
    traffic = gradient_traffic(s.config, s.layout, held)
    return sum(sent.intra + sent.inter for _, kind, sent in traffic if kind != "tp") / GB


def interleaved(s: Subject) -> list[Subject]:
    """Legal 1F1B schedules of the same TP and PP that fit, by model chunks, one chunk first;
    experts inside their stages, so that only the schedule differs."""
    inside = s.layout
    if inside.span:
        expert = default_expert(
            "stage", inside.world, inside.tensor, inside.pipeline, 1, inside.experts
        )
        inside = replace(inside, placement="stage", expert=expert)
    return [one for one in _chunked(s, inside) if fits(
        one.config, one.layout, one.vocab, one.assumptions
    )]  # fmt: skip


def _chunked(s: Subject, inside: Layout) -> list[Subject]:
    found = []
    for chunks in range(1, s.config.model.layers // inside.pipeline + 1):
        layout = replace(inside, virtual_pipeline=chunks)
        parallel = replace(s.config.parallel, placement="stage", virtual_pipeline=chunks)
        config = replace(s.config, parallel=parallel)
        if not any(True for _ in layout_faults(config, layout)):
            found.append(replace(s, config=config, layout=layout))
    return found


def _best_schedule(s: Subject) -> Subject:
    return min(interleaved(s), key=lambda one: one.time.step, default=s)


def _schedule_overrides(s: Subject) -> str:
    return " ".join(_best_schedule(s).layout.overrides())


@quantity("schedule.gain", "of step",
          "what the best interleaved schedule saves over plain 1F1B, experts in their stages",
          _schedule_overrides)  # fmt: skip
def _schedule_gain(s: Subject) -> float:
    schedules = interleaved(s)
    plain = next((one for one in schedules if one.layout.virtual_pipeline == 1), s)
    return max(1 - _best_schedule(s).time.step / plain.time.step, 0.0)


def _least(layout: Layout, stages_of_experts: int) -> int:
    expert = layout.expert_tensor * layout.expert * stages_of_experts
    return math.lcm(layout.tensor * layout.context * layout.pipeline, expert)


@quantity("layout.needed_ranks", "devices", "least number of devices, experts placed as planned")
def _needed(s: Subject) -> float:
    return _least(s.layout, 1 if s.layout.span else s.layout.pipeline)


@quantity(
    "layout.needed_ranks_in_stages",
    "devices",
    "least number of devices with experts inside their stages, as Megatron-Core has them",
)
def _needed_in_stages(s: Subject) -> float:
    return _least(s.layout, s.layout.pipeline)


@quantity("microbatches.enough", "yes/no", "whether twice as many gain less than 1 % of a step")
def _enough(s: Subject) -> float:
    count = microbatches_per_step(s.config, s.layout.data)
    return float(s.bubble(count) - s.bubble(2 * count) < 0.01)


@quantity("expert_cache.needed", "yes/no", "whether experts have to live outside device memory")
def _cache(s: Subject) -> float:
    return float(s.fullest.total > capacity(s.config))


@quantity("router.balances", "yes/no", "whether routing is learnt and balanced")
def _balances(s: Subject) -> float:
    return float(bool(s.config.model.router.balancing_methods))


@quantity("recompute.layers", "layers", "layers recomputed whole")
def _recomputed(s: Subject) -> float:
    return len(s.config.recomputed_layers)
