"""Mixtral (Hugging Face Transformers) and this project's models: names, weights, configs.

A model here is a Mixtral when its router takes the softmax over the chosen k (which equals
Mixtral's softmax over all, renormalised over the k) and it has no shared expert. One table per
set of names says how each of Megatron's global keys splits into tensors; everything is
converted one layer, or one expert, at a time, so a model larger than memory can stream through.

Shape letters: H query heads, G key/value heads, D head width, C hidden, F expert width,
E experts, V vocabulary, R = H/G queries per group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_train.errors import ConfigError
from moe_train.features.balancing import BALANCING

if TYPE_CHECKING:
    from moe_train.config.model import ModelConfig

Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model that the table depends on."""

    layers: int
    heads: int
    kv_heads: int
    experts: int
    vocab: int
    """Rows in the Hugging Face model."""
    padded_vocab: int
    """Rows in ours; those beyond ``vocab`` are zero after an import and dropped by an export."""
    tied: bool = False
    """The output head is the embedding: it has no tensor of its own on either side."""

    @classmethod
    def of(cls, model: ModelConfig, vocab: int, padded_vocab: int) -> Sizes:
        """Sizes of a configured model."""
        return cls(
            layers=model.layers,
            heads=model.heads,
            kv_heads=model.num_query_groups,
            experts=model.experts,
            vocab=vocab,
            padded_vocab=padded_vocab,
            tied=model.tied_embeddings,
        )


def _same_to_hf(ours: torch.Tensor, sizes: Sizes) -> Parts:
    return (ours,)


def _same_to_megatron(theirs: Parts, sizes: Sizes) -> torch.Tensor:
    return theirs[0]


def _qkv_to_hf(ours: torch.Tensor, sizes: Sizes) -> Parts:
    """Megatron interleaves by group: R queries, one key, one value, then the next group."""
    queries = sizes.heads // sizes.kv_heads
    grouped_GRDC = ours.unflatten(0, (sizes.kv_heads, queries + 2, -1))
    parts = grouped_GRDC.split([queries, 1, 1], dim=1)
    return tuple(part.flatten(0, 2) for part in parts)


def _qkv_to_megatron(theirs: Parts, sizes: Sizes) -> torch.Tensor:
    queries = sizes.heads // sizes.kv_heads
    grouped = [
        part.unflatten(0, (sizes.kv_heads, count, -1))
        for part, count in zip(theirs, (queries, 1, 1), strict=True)
    ]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def _gate_up_to_hf(ours: torch.Tensor, sizes: Sizes) -> Parts:
    return ours.chunk(2, dim=0)


def _gate_up_to_megatron(theirs: Parts, sizes: Sizes) -> torch.Tensor:
    return torch.cat(theirs, dim=0)


def _vocab_to_hf(ours: torch.Tensor, sizes: Sizes) -> Parts:
    return (ours[: sizes.vocab],)


def _vocab_to_megatron(theirs: Parts, sizes: Sizes) -> torch.Tensor:
    missing = sizes.padded_vocab - theirs[0].shape[0]
    return torch.nn.functional.pad(theirs[0], (0, 0, 0, missing))


@dataclass(frozen=True)
class Transform:
    """How a tensor of Megatron becomes tensors of Hugging Face, and back."""

    to_hf: Callable[[torch.Tensor, Sizes], Parts]
    to_megatron: Callable[[Parts, Sizes], torch.Tensor]


SAME = Transform(_same_to_hf, _same_to_megatron)
QKV = Transform(_qkv_to_hf, _qkv_to_megatron)
GATE_UP = Transform(_gate_up_to_hf, _gate_up_to_megatron)
VOCAB = Transform(_vocab_to_hf, _vocab_to_megatron)


@dataclass(frozen=True)
class Entry:
    """A global key of Megatron and its Hugging Face names, with ``{layer}`` and ``{expert}``.

    The key's tensor has an axis in front for each of the two that the names mention.
    """

    key: str
    hf_names: tuple[str, ...]
    transform: Transform = SAME

    def places(self, sizes: Sizes) -> Iterator[tuple[int, ...]]:
        """Indices of the leading axes, in order."""
        layers = range(sizes.layers) if "{layer}" in self.hf_names[0] else (None,)
        experts = range(sizes.experts) if "{expert}" in self.hf_names[0] else (None,)
        for layer in layers:
            for expert in experts:
                yield tuple(index for index in (layer, expert) if index is not None)

    def names(self, place: tuple[int, ...]) -> tuple[str, ...]:
        """Hugging Face names of the part at ``place``."""
        indices = dict(zip(("layer", "expert"), place, strict=False))
        return tuple(name.format(**indices) for name in self.hf_names)


_LAYER = "decoder.layers."
_COMMON = (
    Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), VOCAB),
    Entry(
        _LAYER + "self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.{layer}.input_layernorm.weight",),
    ),
    Entry(
        _LAYER + "self_attention.linear_qkv.weight",
        tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.weight" for part in "qkv"),
        QKV,
    ),
    Entry(
        _LAYER + "self_attention.linear_proj.weight",
        ("model.layers.{layer}.self_attn.o_proj.weight",),
    ),
    Entry(
        _LAYER + "pre_mlp_layernorm.weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
    ),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Entry("output_layer.weight", ("lm_head.weight",), VOCAB),
)
_ROUTER = _LAYER + "mlp.router.weight"
_FC1 = _LAYER + "mlp.experts.experts.linear_fc1.weight"
_FC2 = _LAYER + "mlp.experts.experts.linear_fc2.weight"

# Names inside Transformers' model (5.x stacks the experts; gate above up, as Megatron does).
MODULE_TABLE: tuple[Entry, ...] = (
    *_COMMON,
    Entry(_ROUTER, ("model.layers.{layer}.mlp.gate.weight",)),
    Entry(_FC1, ("model.layers.{layer}.mlp.experts.gate_up_proj",)),
    Entry(_FC2, ("model.layers.{layer}.mlp.experts.down_proj",)),
)

_FILE_MOE = "model.layers.{layer}.block_sparse_moe."
# Names in checkpoint files: an expert's three matrices each on their own (w1 gate, w3 up).
FILE_TABLE: tuple[Entry, ...] = (
    *_COMMON,
    Entry(_ROUTER, (_FILE_MOE + "gate.weight",)),
    Entry(
        _FC1,
        (_FILE_MOE + "experts.{expert}.w1.weight", _FILE_MOE + "experts.{expert}.w3.weight"),
        GATE_UP,
    ),
    Entry(_FC2, (_FILE_MOE + "experts.{expert}.w2.weight",)),
)


def entries(table: tuple[Entry, ...], sizes: Sizes) -> tuple[Entry, ...]:
    """The table's entries that a model of these sizes has."""
    return tuple(entry for entry in table if not (sizes.tied and entry.key.startswith("output_")))


def to_mixtral(
    read: Callable[[str, tuple[int, ...]], torch.Tensor],
    sizes: Sizes,
    table: tuple[Entry, ...] = FILE_TABLE,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face names and tensors, one layer or expert at a time.

    Args:
        read: Megatron's global tensor ``key`` at an index of its leading axes: ``(layer,)``,
            ``(layer, expert)`` or ``()``.
    """
    for entry in entries(table, sizes):
        for place in entry.places(sizes):
            parts = entry.transform.to_hf(read(entry.key, place), sizes)
            yield from zip(entry.names(place), parts, strict=True)


def from_mixtral(
    read: Callable[[str], torch.Tensor], sizes: Sizes, table: tuple[Entry, ...] = FILE_TABLE
) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
    """Megatron's global keys, indices of their leading axes, and tensors, one part at a time.

    Args:
        read: the Hugging Face tensor of a name.
    """
    for entry in entries(table, sizes):
        for place in entry.places(sizes):
            theirs = tuple(read(name) for name in entry.names(place))
            yield entry.key, place, entry.transform.to_megatron(theirs, sizes)


def mixtral_config(model: ModelConfig, vocab: int, sequence: int) -> dict[str, Any]:
    """Keyword arguments of Transformers' ``MixtralConfig`` for our model.

    Raises:
        ConfigError: the model is not a Mixtral.
    """
    router = model.router
    for name, differs, need in (
        ("shared_expert_hidden", model.shared_expert_hidden, "0"),
        ("router.score", router.score != "softmax", "softmax"),
        ("router.balancing", not BALANCING[router.balancing].plain_top_k, "aux"),
        ("router.pre_softmax", router.pre_softmax, "false"),
        ("router.expert_bias", router.expert_bias, "false"),
        ("router.groups", router.groups, "null"),
        ("router.scaling_factor", router.scaling_factor not in (None, 1.0), "null"),
        ("router.capacity_factor", router.capacity_factor is not None, "null"),
    ):
        if differs:
            raise ConfigError(
                f"model.{name}", "has no counterpart in Mixtral", f"model.{name}={need}"
            )
    return {
        "vocab_size": vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.expert_hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "num_local_experts": model.experts,
        "num_experts_per_tok": model.experts_per_token,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "router_aux_loss_coef": router.aux_coeff,
        "max_position_embeddings": sequence,
        "hidden_act": "silu",
        "sliding_window": None,
        "attention_dropout": 0.0,
    }


def model_fields(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """``model.*`` overrides for the content of a Mixtral ``config.json``.

    Raises:
        ConfigError: it uses something that our model does not have.
    """
    rope = theirs.get("rope_parameters") or {"rope_theta": theirs.get("rope_theta", 1e6)}
    for name, wrong in (
        ("model_type", theirs.get("model_type", "mixtral") != "mixtral"),
        ("hidden_act", theirs.get("hidden_act", "silu") != "silu"),
        ("rope_parameters", rope.get("rope_type", "default") != "default"),
        ("sliding_window", theirs.get("sliding_window") is not None),
    ):
        if wrong:
            raise ConfigError(name, f"{theirs.get(name)!r} is not supported in a Mixtral import")
    heads = theirs["num_attention_heads"]
    return {
        "model.layers": theirs["num_hidden_layers"],
        "model.hidden": theirs["hidden_size"],
        "model.heads": heads,
        "model.kv_heads": theirs.get("num_key_value_heads") or heads,
        "model.head_dim": theirs.get("head_dim") or theirs["hidden_size"] // heads,
        "model.experts": theirs["num_local_experts"],
        "model.experts_per_token": theirs["num_experts_per_tok"],
        "model.expert_hidden": theirs["intermediate_size"],
        "model.vocab": theirs["vocab_size"],
        "model.tied_embeddings": theirs.get("tie_word_embeddings", False),
        "model.norm_epsilon": theirs["rms_norm_eps"],
        "model.rope_base": rope["rope_theta"],
    }
