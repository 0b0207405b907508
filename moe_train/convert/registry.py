"""The registry of Hugging Face architectures, and the choice of one, with its reasons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.convert.architecture import Architecture
from moe_train.convert.architectures.glm4_moe import GLM4_MOE
from moe_train.convert.architectures.mixtral import MIXTRAL
from moe_train.convert.architectures.olmoe import OLMOE
from moe_train.convert.architectures.qwen3_moe import QWEN3_MOE
from moe_train.errors import ConfigError

ARCHITECTURES = {one.name: one for one in (MIXTRAL, QWEN3_MOE, OLMOE, GLM4_MOE)}

_MLA = "attention is multi-head latent (MLA: q_lora_rank, kv_lora_rank), which is not built here"
FOREIGN = {
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "glm4_moe_lite": _MLA,
    "qwen2_moe": "its shared expert has a gate (shared_expert_gate) and QKV has biases",
    "gpt_oss": "attention has sinks, biases and sliding windows",
    "llama": "it has no experts",
    "mistral": "it has no experts",
    "qwen3": "it has no experts",
}
"""Model types without an architecture here, and what they have that models here do not."""

_REFUSED_PARTS = ("percent", "scaling", "softcap", "scale", "zero_centered", "interleaved")


def choose(model: ModelConfig, megatron: Mapping[str, Any]) -> tuple[Architecture, list[str]]:
    """The architecture of a model, and a line for each on why it fits or not.

    Args:
        megatron: ``megatron.transformer`` of the run, fields that may change what is computed.

    Raises:
        ConfigError: none fits; says what does not fit for each.
    """
    for name, value in megatron.items():
        if any(part in name for part in _REFUSED_PARTS):
            raise ConfigError(
                f"megatron.transformer.{name}",
                f"{value!r}: no Hugging Face architecture here has it",
                "only a model without it can be exported",
            )
    lines, fitting = [], []
    for architecture in ARCHITECTURES.values():
        misfits = architecture.misfits(model)
        if not misfits:
            fitting.append(architecture)
        reason = "; ".join(map(str, misfits)) if misfits else f"fits: {architecture.about}"
        lines.append(f"{architecture.title}: {reason}")
    if not fitting:
        nearest = min(ARCHITECTURES.values(), key=lambda one: len(one.misfits(model)))
        first = nearest.misfits(model)[0]
        raise ConfigError(
            first.key,
            "the model is of no Hugging Face architecture that is known here:\n      "
            + "\n      ".join(lines),
            f"train with another model; nearest is {nearest.title}",
        )
    # No two have the same norm of queries and keys and the same scores.
    assert len(fitting) == 1, [one.name for one in fitting]
    return fitting[0], lines


def architecture_of(theirs: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json names.

    Raises:
        ConfigError: an unknown or unsupported one; says what models here do not have.
    """
    kind, classes = theirs.get("model_type"), theirs.get("architectures")
    if kind not in ARCHITECTURES:
        why = FOREIGN.get(str(kind), "it is of no architecture that is known here")
        raise ConfigError("model_type", f"{kind!r}: {why}", f"one of: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[str(kind)]
    if classes is not None and classes != [architecture.class_name]:
        raise ConfigError(
            "architectures",
            f"{classes!r} is not [{architecture.class_name!r}]",
            "only causal language models can be imported",
        )
    return architecture
