"""GLM-4-MoE: sigmoid scores, a bias on the choice, groups of experts, an ungated shared expert.

Groups are chosen by the sum of their best two scores there, and of their best k // groups_per_token
in Megatron-Core (``group_limited_topk``), so that the two have to be the same. With sigmoid scores
Megatron divides the chosen ones by their sum wherever there are several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.convert.architecture import Architecture, Field, Fixed, Rule, positive
from moe_train.convert.architectures.common import (
    FIELDS,
    FIXED,
    LAYER,
    NO_BIAS,
    attention_entries,
    expert_entries,
    norm_topk,
)
from moe_train.convert.tensors import (
    EXPERT_BIAS,
    SHARED_FC1,
    SHARED_FC2,
    SHARED_GATE_UP,
    Entry,
)
from moe_train.errors import ConfigError


def _groups_agree(model: ModelConfig) -> bool:
    groups, chosen = model.router.groups or 1, model.router.groups_per_token or 1
    return groups == chosen or model.experts_per_token // chosen == 2


def _to_model(theirs: Mapping[str, Any]) -> dict[str, Any]:
    top, experts = positive(theirs, "num_experts_per_tok"), positive(theirs, "n_routed_experts")
    groups, chosen = positive(theirs, "n_group", 1), positive(theirs, "topk_group", 1)
    if groups != chosen and top // chosen != 2:
        raise ConfigError(
            "topk_group",
            f"{chosen} of {groups} groups for {top} experts: groups are chosen by their best two "
            f"scores, and by their best {top // chosen} in Megatron-Core",
        )
    if experts % groups or experts // groups < 2:
        raise ConfigError("n_group", f"{groups} groups of {experts} experts have fewer than two")
    if norm_topk(theirs, True) != (top > 1):
        raise ConfigError(
            "norm_topk_prob",
            f"{norm_topk(theirs, True)!r} with {top} experts a token: sigmoid scores are divided "
            "by their sum where there are several, and only there",
        )
    grouped = groups != chosen
    width = positive(theirs, "moe_intermediate_size", 1408)
    return {
        "qk_norm": "head" if theirs.get("use_qk_norm", False) else "none",
        "shared_expert_hidden": width * positive(theirs, "n_shared_experts", 1),
        "router.score": "sigmoid",
        "router.balancing": "none",
        "router.expert_bias": True,
        "router.groups": groups if grouped else None,
        "router.groups_per_token": chosen if grouped else None,
        "router.scaling_factor": theirs.get("routed_scaling_factor", 1.0),
    }


def _to_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "head_dim": model.kv_channels,
        "use_qk_norm": model.qk_norm == "head",
        "n_shared_experts": model.shared_expert_hidden // model.expert_hidden,
        "n_group": model.router.groups or 1,
        "topk_group": model.router.groups_per_token or 1,
        "norm_topk_prob": model.experts_per_token > 1,
        "routed_scaling_factor": model.router.scaling_factor or 1.0,
        # Of the dense layers, of which there are none.
        "intermediate_size": model.expert_hidden * model.experts_per_token,
        "num_nextn_predict_layers": 0,
    }


def _entries(model: ModelConfig, stacked: bool) -> tuple[Entry, ...]:
    shared = LAYER + "mlp.shared_experts."
    return (
        *attention_entries(model),
        *expert_entries(stacked),
        Entry(EXPERT_BIAS, (LAYER + "mlp.gate.e_score_correction_bias",)),
        Entry(
            SHARED_FC1,
            (shared + "gate_proj.weight", shared + "up_proj.weight"),
            SHARED_GATE_UP,
        ),
        Entry(SHARED_FC2, (shared + "down_proj.weight",)),
    )


GLM4_MOE = Architecture(
    name="glm4_moe",
    title="GLM-4-MoE",
    class_name="Glm4MoeForCausalLM",
    about="sigmoid scores with a bias on the choice, groups, a shared expert",
    fields=(
        *FIELDS,
        Field("n_routed_experts", "experts", 128, ("num_local_experts",)),
        Field("moe_intermediate_size", "expert_hidden", 1408),
        Field("rms_norm_eps", "norm_epsilon", 1e-5),
    ),
    fixed=(
        *FIXED,
        NO_BIAS,
        Fixed("first_k_dense_replace", 0, "every layer is an MoE layer", 1),
    ),
    rules=(
        Rule(
            "router.score", lambda m: m.router.score == "sigmoid", "its router has sigmoid scores"
        ),
        Rule(
            "router.expert_bias",
            lambda m: m.router.expert_bias,
            "its router has a bias on the choice of experts",
        ),
        Rule("qk_norm", lambda m: m.qk_norm != "full", "it normalises each head or none"),
        Rule(
            "shared_expert_hidden",
            lambda m: m.shared_expert_hidden > 0 and m.shared_expert_hidden % m.expert_hidden == 0,
            "its shared expert is a multiple of model.expert_hidden wide",
        ),
        Rule(
            "router.groups_per_token",
            _groups_agree,
            "groups are chosen by the sum of their best two scores, and here by that of their "
            "best experts_per_token // groups_per_token",
        ),
        Rule(
            "router.groups",
            lambda m: m.experts // (m.router.groups or 1) >= 2,
            "groups are chosen by their best two scores",
        ),
    ),
    entries=_entries,
    to_model=_to_model,
    to_config=_to_config,
    consumed=frozenset(
        (
            "use_qk_norm",
            "n_shared_experts",
            "n_group",
            "topk_group",
            "norm_topk_prob",
            "routed_scaling_factor",
        )
    ),  # fmt: skip
    partial_rotary_factor=0.5,
    # Heads that predict further tokens are not part of the model; their tensors would be left over.
    ignored=frozenset(("intermediate_size", "num_nextn_predict_layers", "num_mtp_layers")),
)
