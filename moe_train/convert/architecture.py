"""`Architecture`: the descriptor of a Hugging Face model class, in both directions.

One file an architecture in `moe_train.convert.architectures`; nothing else names one. Defaults of
config.json are those of Transformers' config classes: a field that equals its default need not be
in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_train.config.model import ModelConfig
from moe_train.convert.tensors import Entry
from moe_train.errors import ConfigError
from moe_train.features.balancing import BALANCING

HARMLESS = frozenset(
    (
        "_name_or_path", "architectures", "model_type", "transformers_version", "use_cache",
        "dtype", "torch_dtype", "return_dict", "output_hidden_states", "output_attentions",
        "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
        "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings",
        "output_router_logits", "router_aux_loss_coef", "initializer_range",
    )
)  # fmt: skip
"""Fields of config.json that change no logit, in any architecture."""


@dataclass(frozen=True)
class Field:
    """A field of config.json and a key of the model group with the same value."""

    name: str
    ours: str
    """Dotted below ``model.``."""
    default: Any = None
    """Transformers' default; None: the field has to be there."""
    aliases: tuple[str, ...] = ()
    """Other names that Transformers reads."""


@dataclass(frozen=True)
class Fixed:
    """A field of config.json that has to have one value, and what another would mean."""

    name: str
    value: Any
    why: str
    default: Any = None
    """Transformers' default."""
    write: bool = True


@dataclass(frozen=True)
class Rule:
    """A value of the model's config that the architecture needs."""

    key: str
    """Dotted below ``model.``."""
    holds: Callable[[ModelConfig], bool]
    why: str
    fix: str = ""


@dataclass(frozen=True)
class Misfit:
    """Why a model is not of an architecture."""

    key: str
    value: Any
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.key}={_plain(self.value)}: {self.why}"


@dataclass(frozen=True)
class Architecture:
    """One model class of Transformers."""

    name: str
    """``model_type`` of its config.json."""
    title: str
    class_name: str
    """The class that ``architectures`` names."""
    about: str
    fields: tuple[Field, ...]
    fixed: tuple[Fixed, ...]
    rules: tuple[Rule, ...]
    entries: Callable[[ModelConfig, bool], tuple[Entry, ...]]
    """Tensors of a model; stacked as in Transformers' memory, or one an expert as on its disk."""
    to_model: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Keys of the model group (dotted) that follow from several fields of config.json."""
    to_config: Callable[[ModelConfig], dict[str, Any]]
    """Fields of config.json that follow from several keys."""
    consumed: frozenset[str]
    """Fields that `to_model` reads."""
    rope_base: float = 10000.0
    """Transformers' default of rope_theta."""
    partial_rotary_factor: float = 1.0
    """Transformers' default."""
    ignored: frozenset[str] = field(default_factory=frozenset)
    """Further fields that change no logit."""

    def misfits(self, model: ModelConfig) -> list[Misfit]:
        """Everything about a model that the architecture does not have; empty where it fits."""
        return [
            Misfit(f"model.{rule.key}", value_of(model, rule.key), rule.why, rule.fix)
            for rule in (*COMMON_RULES, *self.rules)
            if not rule.holds(model)
        ]

    def tensors(
        self, model: ModelConfig, stacked: bool = False
    ) -> Iterator[tuple[Entry, int | None]]:
        """Units in the order of their layers: of no layer first, then layer by layer."""
        entries = self.entries(model, stacked)
        yield from ((entry, None) for entry in entries if not entry.key.per_layer)
        for layer in range(model.layers):
            yield from ((entry, layer) for entry in entries if entry.key.per_layer)

    def expected(
        self, model: ModelConfig, vocab: int, stacked: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """Shapes by name of all tensors."""
        return {
            name: shape
            for entry, layer in self.tensors(model, stacked)
            for names in entry.names_of(model, layer)
            for name, shape in zip(names, entry.shapes(model, vocab), strict=True)
        }


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def value_of(model: ModelConfig, key: str) -> Any:
    """A value of the model group by its dotted key."""
    value: Any = model
    for part in key.split("."):
        value = getattr(value, part)
    return value


def unscaled(model: ModelConfig) -> bool:
    """Whether the chosen probabilities are used as they are."""
    return model.router.scaling_factor in (None, 1.0)


COMMON_RULES = (
    Rule(
        "router.balancing",
        lambda m: BALANCING[m.router.balancing].plain_top_k,
        "evaluation is not a top-k of the scores",
        "model.router.balancing=aux",
    ),
    Rule(
        "router.capacity_factor",
        lambda m: m.router.capacity_factor is None,
        "tokens over the capacity are dropped; Transformers' experts take all of them",
        "model.router.capacity_factor=null",
    ),
    Rule(
        "router.force_balance",
        lambda m: not m.router.force_balance,
        "routing is random",
        "model.router.force_balance=false",
    ),
    Rule("kv_lora_rank", lambda m: not m.latent, "attention is multi-latent (MLA)"),
    Rule("dense_layers", lambda m: not m.dense_layers, "every layer is an MoE layer there"),
    Rule("mtp_layers", lambda m: not m.mtp_layers, "it has no heads of further tokens"),
)

SOFTMAX_RULES = (
    Rule("router.score", lambda m: m.router.score == "softmax", "its router has softmax scores"),
    Rule(
        "shared_expert_hidden", lambda m: not m.shared_expert_hidden, "it has no shared expert"
    ),
    Rule("router.expert_bias", lambda m: not m.router.expert_bias, "its router has no bias"),
    Rule(
        "router.groups",
        lambda m: m.router.groups in (None, 1),
        "its router has no groups of experts",
    ),
    Rule("router.scaling_factor", unscaled, "its router does not scale probabilities"),
)  # fmt: skip
"""Of Mixtral, Qwen3-MoE and OLMoE."""


def hf_config(
    architecture: Architecture, model: ModelConfig, vocab: int, dtype: str, positions: int
) -> dict[str, Any]:
    """Content of config.json.

    Args:
        vocab: rows of the embedding.
        dtype: of the weights, by torch's name.
        positions: longest sequence that the model was trained on.

    Raises:
        ConfigError: the model is not of this architecture.
    """
    if misfits := architecture.misfits(model):
        first = misfits[0]
        raise ConfigError(first.key, f"{architecture.title}: {first}", first.fix)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(int(model.rope_base))}
    if architecture.partial_rotary_factor != 1.0:
        rope["partial_rotary_factor"] = 1.0
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.name,
        "dtype": dtype,
        "vocab_size": vocab,
        "num_key_value_heads": model.num_query_groups,
        "max_position_embeddings": positions,
        "initializer_range": model.init_std,
        "rope_parameters": rope,
        # Read by versions before rope_parameters.
        "rope_theta": rope["rope_theta"],
        "use_cache": True,
        "output_router_logits": False,
    }
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = 1.0
    config |= {one.name: value_of(model, one.ours) for one in architecture.fields}
    config |= {one.name: one.value for one in architecture.fixed if one.write}
    return config | architecture.to_config(model)


def model_mapping(architecture: Architecture, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the model group, dotted, for the content of a config.json.

    Raises:
        ConfigError: it names something that the models here do not have, or that is unknown.
    """
    known = (
        HARMLESS
        | architecture.consumed
        | architecture.ignored
        | {one.name for one in architecture.fixed}
        | {name for one in architecture.fields for name in (one.name, *one.aliases)}
        | {"vocab_size", "num_key_value_heads", "head_dim", "tie_word_embeddings"}
        | {"rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"}
    )
    for name in sorted(theirs):
        if name in CODE:
            raise ConfigError(name, f"{theirs[name]!r}: {CODE[name]}", "")
        if name not in known:
            raise ConfigError(
                name,
                f"{theirs[name]!r}: is no field of {architecture.title} that is known here",
                "remove it from config.json if it changes no logit",
            )
    for fixed in architecture.fixed:
        value = theirs.get(fixed.name, fixed.default)
        if value != fixed.value and not (value is None and fixed.value in (False, 0, [])):
            raise ConfigError(
                fixed.name,
                f"{value!r}: {fixed.why}",
                f"only {fixed.name}={fixed.value!r} is supported",
            )
    heads = positive(theirs, "num_attention_heads")
    hidden = positive(theirs, "hidden_size")
    head_dim = theirs.get("head_dim")
    if head_dim is None and hidden % heads:
        raise ConfigError("num_attention_heads", f"{heads} does not divide hidden_size={hidden}")
    mapping: dict[str, Any] = {
        "name": architecture.name,
        "vocab": positive(theirs, "vocab_size"),
        # No rows but the model's own: padding would take part in the softmax of the loss.
        "vocab_multiple": math.gcd(positive(theirs, "vocab_size"), 128),
        "kv_heads": positive(theirs, "num_key_value_heads", heads),
        "head_dim": positive(theirs, "head_dim", hidden // heads),
        "rope_base": _rope_base(architecture, theirs),
        "init_std": theirs.get("initializer_range", 0.02),
    }
    for one in architecture.fields:
        given = {
            name: theirs[name]
            for name in (one.name, *one.aliases)
            if name in theirs and theirs[name] is not None
        }
        if len(set(map(repr, given.values()))) > 1:
            raise ConfigError(one.name, f"contradicts its other names: {given}")
        if not given and one.default is None:
            raise ConfigError(one.name, "is not in config.json")
        mapping[one.ours] = next(iter(given.values()), one.default)
    mapping |= architecture.to_model(theirs)
    if mapping["experts_per_token"] == 1 and mapping.get("router.pre_softmax") is False:
        raise ConfigError(
            "num_experts_per_tok",
            "1 with renormalised probabilities: the router's probability is constant, which "
            "Megatron-Core refuses",
        )
    return mapping


CODE = {
    "auto_map": "code of its own, which is never run",
    "quantization_config": "quantised weights are not read",
    "custom_pipelines": "code of its own, which is never run",
}
"""Fields of config.json that are refused whatever their value."""


def positive(theirs: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer of config.json.

    Raises:
        ConfigError: it is something else, or missing without a default.
    """
    value = theirs.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(name, "is not in config.json")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(name, f"{value!r} is no positive integer")
    return value


def _rope_base(architecture: Architecture, theirs: Mapping[str, Any]) -> float:
    rope = theirs.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError("rope_parameters", f"{rope!r} is no mapping")
    rope = dict(rope)
    if theirs.get("rope_scaling"):
        raise ConfigError("rope_scaling", f"{theirs['rope_scaling']!r}: positions are not scaled")
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind != "default":
        raise ConfigError("rope_parameters", f"rope scaling {kind!r}: positions are not scaled")
    values = {}
    for name, default in (
        ("rope_theta", architecture.rope_base),
        ("partial_rotary_factor", architecture.partial_rotary_factor),
    ):
        inside, outside = rope.pop(name, None), theirs.get(name)
        if None not in (inside, outside) and inside != outside:
            raise ConfigError(
                name, f"{outside!r} contradicts rope_parameters, which has {inside!r}"
            )
        chosen = inside if inside is not None else outside
        values[name] = default if chosen is None else chosen
    if rope:
        raise ConfigError("rope_parameters", f"{sorted(rope)}: positions are not scaled")
    if values["partial_rotary_factor"] != 1.0:
        factor = values["partial_rotary_factor"]
        raise ConfigError("partial_rotary_factor", f"{factor!r}: every column is rotated here")
    base = values["rope_theta"]
    if isinstance(base, bool) or not isinstance(base, int | float) or base < 1 or base % 1:
        raise ConfigError("rope_theta", f"{base!r}: Megatron-Core takes a whole number")
    return float(base)
