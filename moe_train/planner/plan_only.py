"""Features of models and layouts that are planned, and that the runtime does not train yet."""

from __future__ import annotations

from moe_train.config.root import Config
from moe_train.errors import ConfigError

REMARK = "planned only, the runtime does not train it yet"


def plan_only(config: Config) -> list[ConfigError]:
    """What `config` asks for that can only be planned; each names its field and the alternative."""
    model, parallel = config.model, config.parallel
    features = (
        ("parallel.stages", parallel.stages, "uneven stages", "parallel.stages=''"),
        ("model.dense_layers", model.dense_layers, "dense layers", "0: experts in every layer"),
        ("model.mtp_layers", model.mtp_layers, "multi-token prediction", "model.mtp_layers=0"),
        ("model.kv_lora_rank", model.kv_lora_rank, "multi-latent attention", "null: grouped-query"),
        (
            "recompute.modules",
            "mla_up_proj" in config.recompute.modules,
            "mla_up_proj",
            "modules of grouped-query attention",
        ),
    )
    return [
        ConfigError(field, f"{about}: {REMARK}", fix)
        for field, value, about, fix in features
        if value
    ]


def plan_only_notes(config: Config) -> list[str]:
    """The same as remarks of a plan."""
    return [f"{fault.field}: {fault.problem}" for fault in plan_only(config)]
