"""The content of ``plan.json`` and of the plan's tables, as one plain mapping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe_train.config.environment import variables
from moe_train.config.kernels import KernelChoice, expected_kernels, expected_kernels_on
from moe_train.config.root import Config
from moe_train.config.schema import to_mapping
from moe_train.parallel.groups import communicators, deployment
from moe_train.parallel.layout import GROUPS, Layout, ranges
from moe_train.parallel.parameters import RankParameters, model_parameters
from moe_train.planner.cost.timing import StepTime
from moe_train.planner.memory.stages import StageMemory, worst
from moe_train.planner.plan import Plan
from moe_train.planner.report.costs import cost_report

VERSION = 2
"""Raised when a key of the report changes its meaning or goes away."""


def _rank(config: Config, layout: Layout, rank: int, counts: RankParameters) -> dict[str, Any]:
    place, experts = layout.coordinates(rank), layout.local_experts(rank)
    return {
        "rank": rank,
        "node": rank // config.hardware.devices_per_node,
        "dense": place.dense._asdict(),
        "expert": place.expert._asdict(),
        "layers": ranges(layout.stage_layers(place.dense.pp), ", "),
        "expert_layers": ranges(layout.expert_layers(rank), ", "),
        "experts": [experts.start, experts.stop - 1],
        "expert_modules": counts.expert_modules,
        "parameters": {**asdict(counts), "total": counts.total},
    }


def kernels_report(config: Config, chosen: KernelChoice | None = None) -> dict[str, Any]:
    """The kernel set of a run, and its settings of Megatron's TransformerConfig, with reasons."""
    choice = chosen or (
        expected_kernels(config.backend.kernels, on_cpu=True)
        if config.device == "cpu"
        else expected_kernels_on(config.backend.kernels, config.hardware)
    )
    return {
        "name": choice.kernels.name,
        "why": choice.why,
        "about": choice.kernels.about,
        "settings": {
            setting.field: {"value": setting.value, "why": setting.why}
            for setting in choice.kernels.settings
        },
    }


def plan_report(
    plan: Plan,
    memory: Sequence[StageMemory],
    time: StepTime,
    kernels: KernelChoice | None = None,
) -> dict[str, Any]:
    """The content of ``plan.json`` for a legal, resolved config.

    Args:
        kernels: the kernel set of a run; None for the one that it would choose.

    Layers and ranks are named as in the config (layers from 1, ranks and experts from
    0); parameters are counts of numbers, not bytes.
    """
    config, layout, model = plan.config, plan.layout, plan.config.model
    counts = model_parameters(model, plan.vocab)
    held = [plan.parameters(stage) for stage in range(layout.pipeline)]
    groups = {kind: layout.groups(kind) for kind in GROUPS}
    ranks = [
        _rank(config, layout, rank, held[rank // layout.ranks_per_stage])
        for rank in range(layout.world)
    ]
    return {
        "version": VERSION,
        "experiment": config.experiment,
        "experiment_reason": config.experiment_reason,
        "model": model.name,
        "model_config": to_mapping(config)["model"],
        "layout": {
            "tag": layout.tag,
            "world": layout.world,
            **to_mapping(config.parallel),
            "data": layout.data,
            "expert_data": layout.expert_data,
        },
        "batch": {
            "micro": config.batch.micro,
            "microbatches_per_step": plan.microbatches,
            "sequences_per_step": plan.sequences,
            "tokens_per_step": plan.tokens,
        },
        "recompute": to_mapping(config)["recompute"],
        "vocabulary": {
            "tokens": plan.vocab,
            "rows": plan.padded_vocab,
            "source": plan.vocab_source,
        },
        "kernels": kernels_report(config, kernels),
        "parameters": {
            "total": counts.total,
            **asdict(counts),
            "largest_rank": max(rank["parameters"]["total"] for rank in ranks),
        },
        "stages": [
            {
                "stage": stage,
                "ranks": list(layout.stage_ranks(stage)),
                "chunks": [
                    layout.stage_layers(stage, chunk) for chunk in range(layout.virtual_pipeline)
                ],
            }
            for stage in range(layout.pipeline)
        ],
        "ranks": ranks,
        "groups": groups,
        "communicators": communicators(config, layout, groups),
        "environment": [asdict(one) for one in variables(config)],
        "deployment": deployment(layout),
        "fits": worst(memory).total <= plan.device_bytes,
        **cost_report(plan, memory, time),
    }
