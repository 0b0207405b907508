"""Fields, fixed values and tensors that several architectures share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.convert.architecture import Field, Fixed
from moe_train.convert.tensors import (
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    GATE_UP,
    HEAD,
    INPUT_NORM,
    K_NORM,
    LINEAR_PROJ,
    LINEAR_QKV,
    MLP_NORM,
    Q_NORM,
    QKV,
    ROUTER,
    Entry,
)
from moe_train.errors import ConfigError

LAYER = "model.layers.{layer}."

FIELDS = (
    Field("hidden_size", "hidden"),
    Field("num_hidden_layers", "layers"),
    Field("num_attention_heads", "heads"),
    Field("num_experts_per_tok", "experts_per_token"),
    Field("tie_word_embeddings", "tied_embeddings", False),
)
"""Without the expert's names and the norm's epsilon, whose default differs."""

FIXED = (
    Fixed("hidden_act", "silu", "experts are SwiGLU", "silu"),
    Fixed("attention_dropout", 0.0, "there is no dropout", 0.0),
)
NO_BIAS = Fixed("attention_bias", False, "projections have no biases", False)


def attention_entries(model: ModelConfig) -> tuple[Entry, ...]:
    """Embedding, head, norms and attention: the names of Llama, which all have taken over."""
    norms = (
        Entry(Q_NORM, (LAYER + "self_attn.q_norm.weight",)),
        Entry(K_NORM, (LAYER + "self_attn.k_norm.weight",)),
    )
    return (
        Entry(EMBEDDING, ("model.embed_tokens.weight",)),
        Entry(FINAL_NORM, ("model.norm.weight",)),
        *(() if model.tied_embeddings else (Entry(HEAD, ("lm_head.weight",)),)),
        Entry(INPUT_NORM, (LAYER + "input_layernorm.weight",)),
        Entry(LINEAR_QKV, tuple(LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"), QKV),
        Entry(LINEAR_PROJ, (LAYER + "self_attn.o_proj.weight",)),
        *(norms if model.qk_norm != "none" else ()),
        Entry(MLP_NORM, (LAYER + "post_attention_layernorm.weight",)),
    )


def expert_entries(
    stacked: bool,
    block: str = "mlp.",
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Entry, ...]:
    """Router and experts.

    Args:
        stacked: as in Transformers' memory: all experts of a layer in one tensor, gate above up.
        block: the module's name on disk.
        parts: names of an expert's gate, up and down on disk.
    """
    if stacked:
        return (
            Entry(ROUTER, (LAYER + "mlp.gate.weight",)),
            Entry(FC1, (LAYER + "mlp.experts.gate_up_proj",)),
            Entry(FC2, (LAYER + "mlp.experts.down_proj",)),
        )
    gate, up, down = (LAYER + block + f"experts.{{expert}}.{part}.weight" for part in parts)
    return (
        Entry(ROUTER, (LAYER + block + "gate.weight",)),
        Entry(FC1, (gate, up), GATE_UP),
        Entry(FC2, (down,)),
    )


def balancing(theirs: Mapping[str, Any], default: float) -> dict[str, Any]:
    """The auxiliary loss, which Transformers adds where output_router_logits says so."""
    return {
        "router.balancing": "aux" if theirs.get("output_router_logits") else "none",
        "router.aux_coeff": theirs.get("router_aux_loss_coef", default),
    }


def norm_topk(theirs: Mapping[str, Any], default: bool) -> bool:
    """norm_topk_prob.

    Raises:
        ConfigError: it is no boolean.
    """
    value = theirs.get("norm_topk_prob", default)
    if not isinstance(value, bool):
        raise ConfigError("norm_topk_prob", f"{value!r} is no boolean")
    return value
