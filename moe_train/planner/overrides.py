"""Which ``megatron.*`` overrides the formulas of memory and time price."""

from __future__ import annotations

from moe_train.config.root import Config

PRICED = {
    "transformer": {
        "cuda_graph_impl",
        "cuda_graph_scope",
        "gradient_accumulation_fusion",
    },
    "ddp": {"bucket_size", "fp8_param_gather"},
    "optimizer": set[str](),
}
"""Fields that a formula reads."""

NEUTRAL = {
    "transformer": {
        "embedding_init_method_std",
        "init_method_std",
        "layernorm_epsilon",
        "moe_router_bias_update_rate",
        "mtp_loss_scaling_factor",
    },
    "ddp": set[str](),
    "optimizer": {"adam_beta1", "adam_beta2", "adam_eps", "loss_scale", "sgd_momentum"},
}
"""Fields that change neither memory nor time."""


def unpriced_overrides(config: Config) -> list[str]:
    """``megatron.*`` overrides that are set and that no formula reads."""
    return [
        f"megatron.{section}.{key}"
        for section in ("transformer", "ddp", "optimizer")
        for key in getattr(config.megatron, section)
        if key not in PRICED[section] | NEUTRAL[section]
    ]


def unpriced_note(config: Config) -> str | None:
    """The same as a sentence; None where all are priced."""
    if not (fields := unpriced_overrides(config)):
        return None
    return (
        f"the formulas of memory and time do not price {', '.join(fields)}: the run may need more "
        "or less"
    )
