"""Qwen3-MoE: per-head norm of queries and keys, probabilities renormalised or not."""

from __future__ import annotations

from moe_train.convert.architecture import SOFTMAX_RULES, Architecture, Field, Fixed, Rule
from moe_train.convert.architectures.common import (
    FIELDS,
    FIXED,
    NO_BIAS,
    attention_entries,
    balancing,
    expert_entries,
    norm_topk,
)

QWEN3_MOE = Architecture(
    name="qwen3_moe",
    title="Qwen3-MoE",
    class_name="Qwen3MoeForCausalLM",
    about="softmax, norm of each head's queries and keys",
    fields=(
        *FIELDS,
        Field("num_experts", "experts", 128, ("num_local_experts",)),
        Field("moe_intermediate_size", "expert_hidden", 768),
        Field("rms_norm_eps", "norm_epsilon", 1e-6),
    ),
    fixed=(
        *FIXED,
        NO_BIAS,
        Fixed("use_sliding_window", False, "there is no sliding_window", False),
        Fixed("mlp_only_layers", [], "every layer is an MoE layer", []),
        Fixed("decoder_sparse_step", 1, "every layer is an MoE layer", 1),
    ),
    rules=(
        *SOFTMAX_RULES,
        Rule("qk_norm", lambda m: m.qk_norm == "head", "it normalises each head's q and k"),
    ),
    entries=lambda model, stacked: (*attention_entries(model), *expert_entries(stacked)),
    to_model=lambda theirs: {
        "qk_norm": "head",
        "router.score": "softmax",
        "router.pre_softmax": not norm_topk(theirs, False),
        **balancing(theirs, 0.001),
    },
    to_config=lambda model: {
        "head_dim": model.kv_channels,
        "norm_topk_prob": not model.router.pre_softmax,
        "router_aux_loss_coef": model.router.aux_coeff,
        # Of the dense layers, of which there are none.
        "intermediate_size": model.expert_hidden * model.experts_per_token,
        "sliding_window": None,
    },
    consumed=frozenset(("norm_topk_prob",)),
    ignored=frozenset(("intermediate_size", "sliding_window", "max_window_layers")),
)
