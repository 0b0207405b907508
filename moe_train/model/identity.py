"""What makes two models the same: the fields that fix the shapes of their weights."""

from __future__ import annotations

from typing import Any

from moe_train.config.model import ModelConfig


def identity(model: ModelConfig, padded_vocab: int) -> dict[str, Any]:
    """Fields that a checkpoint and a run must share; layout, precision and widths of batches
    are free."""
    return {
        "layers": model.layers,
        "hidden": model.hidden,
        "heads": model.heads,
        "kv_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "experts": model.experts,
        "expert_hidden": model.expert_hidden,
        "shared_expert_hidden": model.shared_expert_hidden,
        "padded_vocab": padded_vocab,
        "tied_embeddings": model.tied_embeddings,
        "expert_bias": model.router.expert_bias,
        **{name: True for method in model.router.balancing_methods for name in method.state},
    }
