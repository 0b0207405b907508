"""Mixtral: softmax over the chosen k, no QK norm.

Transformers takes the softmax over all experts and divides by the sum of the chosen ones', which is
the softmax over the chosen ones.
"""

from __future__ import annotations

from moe_train.convert.architecture import SOFTMAX_RULES, Architecture, Field, Fixed, Rule
from moe_train.convert.architectures.common import (
    FIELDS,
    FIXED,
    attention_entries,
    balancing,
    expert_entries,
)

MIXTRAL = Architecture(
    name="mixtral",
    title="Mixtral",
    class_name="MixtralForCausalLM",
    about="softmax over the chosen experts, no norm of queries and keys",
    fields=(
        *FIELDS,
        Field("num_local_experts", "experts", 8, ("num_experts",)),
        Field("intermediate_size", "expert_hidden", 14336),
        Field("rms_norm_eps", "norm_epsilon", 1e-5),
    ),
    fixed=(
        *FIXED,
        Fixed("sliding_window", None, "attention is causal over the whole sequence"),
        Fixed("router_jitter_noise", 0.0, "the router's input has no noise", 0.0),
    ),
    rules=(
        *SOFTMAX_RULES,
        Rule("qk_norm", lambda m: m.qk_norm == "none", "it does not normalise queries and keys"),
        Rule(
            "router.pre_softmax",
            lambda m: not m.router.pre_softmax,
            "it divides the chosen probabilities by their sum",
        ),
    ),
    entries=lambda model, stacked: (
        *attention_entries(model),
        *expert_entries(stacked, "block_sparse_moe.", ("w1", "w3", "w2")),
    ),
    to_model=lambda theirs: {
        "qk_norm": "none",
        "router.score": "softmax",
        "router.pre_softmax": False,
        **balancing(theirs, 0.001),
    },
    to_config=lambda model: {
        "head_dim": model.kv_channels,
        "router_aux_loss_coef": model.router.aux_coeff,
    },
    consumed=frozenset(),
    rope_base=1e6,
)
