"""Everything the plan knows, as one plain mapping: ``plan.json`` and the tables' source."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moe_train.config.environment import variables
from moe_train.config.kernels import KernelChoice, planned_kernels, run_kernels
from moe_train.config.root import Config
from moe_train.config.schema import to_mapping
from moe_train.parallel.batch import microbatches_per_step, sequences_per_step
from moe_train.parallel.groups import communicators, deployment
from moe_train.parallel.layout import GROUPS, Layout
from moe_train.parallel.parameters import (
    RankParameters,
    model_parameters,
    padded_vocab,
    rank_parameters,
)
from moe_train.parallel.shapes import Assumptions
from moe_train.parallel.vocabulary import vocabulary
from moe_train.planner.memory.fit import assumptions_of
from moe_train.planner.report.costs import cost_report

VERSION = 2
"""Raised when a key of the report changes its meaning or goes away."""


def _ranges(numbers: list[int]) -> str:
    """``1-4`` or ``1-2, 9-10``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _rank(config: Config, layout: Layout, rank: int, counts: RankParameters) -> dict[str, Any]:
    place, experts = layout.coordinates(rank), layout.local_experts(rank)
    return {
        "rank": rank,
        "node": rank // config.hardware.devices_per_node,
        "dense": place.dense._asdict(),
        "expert": place.expert._asdict(),
        "layers": _ranges(layout.stage_layers(place.dense.pp)),
        "expert_layers": _ranges(layout.expert_layers(rank)),
        "experts": [experts.start, experts.stop - 1],
        "expert_modules": counts.expert_modules,
        "parameters": {**asdict(counts), "total": counts.total},
    }


def kernels_report(config: Config, taken: KernelChoice | None = None) -> dict[str, Any]:
    """The kernel set of a run, and what it sets in Megatron's TransformerConfig, with reasons."""
    planned = (
        planned_kernels(config.backend.kernels, on_cpu=True)
        if config.device == "cpu"
        else run_kernels(config.backend.kernels, config.hardware)
    )
    choice = taken or planned
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
    config: Config,
    layout: Layout,
    assumptions: Assumptions | None = None,
    kernels: KernelChoice | None = None,
) -> dict[str, Any]:
    """The plan of a legal, resolved config.

    Args:
        assumptions: routing imbalance and allocator waste; None takes the usual ones.
        kernels: the kernel set that a run has taken; None for the one that it would take.

    Layers and ranks are named as in the config (layers from 1, ranks and experts from
    0); parameters are counts of numbers, not bytes.
    """
    vocab, vocab_source = vocabulary(config)
    model = config.model
    counts = model_parameters(model, vocab)
    per_stage = layout.ranks_per_stage
    # All ranks of a stage hold as much.
    held = [
        rank_parameters(model, layout, stage * per_stage, vocab) for stage in range(layout.pipeline)
    ]
    groups = {kind: layout.groups(kind) for kind in GROUPS}
    ranks = [_rank(config, layout, rank, held[rank // per_stage]) for rank in range(layout.world)]
    return {
        "version": VERSION,
        "experiment": config.experiment,
        "experiment_reason": config.experiment_reason,
        "model": model.name,
        "layout": {
            "tag": layout.tag,
            "world": layout.world,
            **to_mapping(config.parallel),
            "data": layout.data,
            "expert_data": layout.expert_data,
        },
        "batch": {
            "micro": config.batch.micro,
            "microbatches_per_step": microbatches_per_step(config, layout.data),
            "sequences_per_step": sequences_per_step(config, layout.data),
            "tokens_per_step": sequences_per_step(config, layout.data) * config.data.sequence,
        },
        "vocabulary": {
            "tokens": vocab,
            "rows": padded_vocab(vocab, model.vocab_multiple),
            "source": vocab_source,
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
                "ranks": list(range(stage * per_stage, (stage + 1) * per_stage)),
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
        **cost_report(config, layout, vocab, assumptions or assumptions_of(config)),
    }
