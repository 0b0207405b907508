"""Everything the plan knows, as one plain mapping: ``plan.json`` and the tables' source."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_train.config.convert import to_mapping
from moe_train.config.root import Config
from moe_train.plan.batch import microbatches_per_step, sequences_per_step
from moe_train.plan.layout import GROUP_KINDS, Layout
from moe_train.plan.parameters import model_parameters, padded_vocab, rank_parameters

VERSION = 1
"""Raised when a key of the report changes its meaning or goes away."""

BYTE_VOCAB = 257
EMBEDDED_VOCAB = 4096


def vocabulary(config: Config) -> tuple[int, str]:
    """Tokens in the vocabulary, unpadded, and where the number comes from.

    A tokenizer file or the embedded corpus is not opened for a plan; a dataset's
    manifest (``PREFIX.json``) is, since it is small.
    """
    if config.model.vocab is not None:
        return config.model.vocab, "model.vocab"
    if config.data.tokenizer == "byte":
        return BYTE_VOCAB, "byte tokenizer"
    for entry in config.data.train:
        manifest = Path(entry.rpartition(":")[2] + ".json")
        if manifest.is_file():
            size = json.loads(manifest.read_text(encoding="utf-8")).get("vocab_size")
            if isinstance(size, int) and size > 0:
                return size, str(manifest)
    source = "the data's tokenizer decides" if config.data.train else "embedded corpus"
    return EMBEDDED_VOCAB, f"assumed ({source}); set model.vocab to fix it"


def _ranges(numbers: list[int]) -> str:
    """``1-4`` or ``1-2, 9-10``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _rank(config: Config, layout: Layout, rank: int, vocab: int) -> dict[str, Any]:
    place, counts = layout.coordinates(rank), rank_parameters(config.model, layout, rank, vocab)
    experts = layout.local_experts(rank)
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


def plan_report(config: Config, layout: Layout) -> dict[str, Any]:
    """The plan of a legal, resolved config.

    Layers and ranks are named as in the config (layers from 1, ranks and experts from
    0); parameters are counts of numbers, not bytes.
    """
    vocab, vocab_source = vocabulary(config)
    model = config.model
    counts = model_parameters(model, vocab)
    ranks = [_rank(config, layout, rank, vocab) for rank in range(layout.world)]
    per_stage = layout.world // layout.pipeline
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
        "groups": {kind: layout.groups(kind) for kind in GROUP_KINDS},
    }
