"""OLMoE: norm of queries and keys over the full width, probabilities as the softmax has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.convert.architecture import (
    SOFTMAX_RULES,
    Architecture,
    Field,
    Fixed,
    Rule,
    positive,
)
from moe_train.convert.architectures.common import (
    FIELDS,
    FIXED,
    NO_BIAS,
    attention_entries,
    balancing,
    expert_entries,
    norm_topk,
)
from moe_train.errors import ConfigError


def _to_model(theirs: Mapping[str, Any]) -> dict[str, Any]:
    heads, hidden = positive(theirs, "num_attention_heads"), positive(theirs, "hidden_size")
    if positive(theirs, "head_dim", hidden // heads) * heads != hidden:
        raise ConfigError(
            "head_dim", f"{theirs['head_dim']!r}: its norms are hidden_size={hidden} wide"
        )
    return {
        "qk_norm": "full",
        "router.score": "softmax",
        "router.pre_softmax": not norm_topk(theirs, False),
        **balancing(theirs, 0.01),
    }


OLMOE = Architecture(
    name="olmoe",
    title="OLMoE",
    class_name="OlmoeForCausalLM",
    about="softmax, norm of queries and keys over all heads together",
    fields=(
        *FIELDS,
        Field("num_experts", "experts", 64, ("num_local_experts",)),
        Field("intermediate_size", "expert_hidden", 2048),
        Field("rms_norm_eps", "norm_epsilon", 1e-5),
    ),
    fixed=(
        *FIXED,
        NO_BIAS,
        Fixed("clip_qkv", None, "queries, keys and values are not clipped"),
    ),
    rules=(
        *SOFTMAX_RULES,
        Rule("qk_norm", lambda m: m.qk_norm == "full", "it normalises all heads' q and k together"),
        Rule(
            "head_dim",
            lambda m: m.query_width == m.hidden,
            "its heads are model.hidden / model.heads wide",
        ),
    ),
    entries=lambda model, stacked: (*attention_entries(model), *expert_entries(stacked)),
    to_model=_to_model,
    to_config=lambda model: {
        "norm_topk_prob": not model.router.pre_softmax,
        "router_aux_loss_coef": model.router.aux_coeff,
        # Transformers' defaults are those of the published vocabulary.
        "pad_token_id": None,
        "eos_token_id": None,
    },
    consumed=frozenset(("norm_topk_prob",)),
)
