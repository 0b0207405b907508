"""How a tensor of a checkpoint here becomes tensors of Hugging Face, and back.

A unit is one global key of one layer. Values are only moved, never computed with, so that they are
held as unsigned integers of their width: bf16 needs no library, and no bit can change.

Shape letters: H hidden, Q width of all queries, G of all keys, D of a head, F of an expert, W of
the shared expert, E experts, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_train.config.model import ModelConfig
from moe_train.errors import CheckpointError

type Array = NDArray[Any]
type Shape = tuple[int, ...]

WIDTHS = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes of the dtypes of weights, by their names in safetensors."""
RAW: dict[int, np.dtype[Any]] = {4: np.dtype("<u4"), 2: np.dtype("<u2")}
"""Integers that hold values of a width."""


def raw(dtype: str) -> np.dtype[Any]:
    """The integers that hold values of a safetensors dtype."""
    return RAW[WIDTHS[dtype]]


@dataclass(frozen=True)
class Transform:
    """Splits the rows of a tensor of Megatron among several tensors of Hugging Face, and back."""

    rows: Callable[[ModelConfig], Shape | None]
    """Rows of each part; None: one part with all rows."""
    split: Callable[[Array, ModelConfig], tuple[Array, ...]]
    join: Callable[[tuple[Array, ...], ModelConfig], Array]


def _qkv_split(ours: Array, model: ModelConfig) -> tuple[Array, ...]:
    """Megatron interleaves by group: R queries, one key, one value, then the next group."""
    groups, queries = model.num_query_groups, model.heads // model.num_query_groups
    grouped = ours.reshape(groups, queries + 2, model.kv_channels, -1)
    parts = (grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1])
    return tuple(part.reshape(-1, ours.shape[1]) for part in parts)


def _qkv_join(theirs: tuple[Array, ...], model: ModelConfig) -> Array:
    groups, columns = model.num_query_groups, theirs[0].shape[1]
    grouped = [part.reshape(groups, -1, model.kv_channels, columns) for part in theirs]
    return np.concatenate(grouped, axis=1).reshape(-1, columns)


SAME = Transform(lambda model: None, lambda ours, model: (ours,), lambda theirs, model: theirs[0])
QKV = Transform(
    lambda model: (model.query_width, model.kv_width, model.kv_width), _qkv_split, _qkv_join
)
GATE_UP = Transform(
    lambda model: (model.expert_hidden,) * 2,
    lambda ours, model: tuple(np.split(ours, 2)),
    lambda theirs, model: np.concatenate(theirs),
)
SHARED_GATE_UP = Transform(
    lambda model: (model.shared_expert_hidden,) * 2, GATE_UP.split, GATE_UP.join
)

_LAYER = "decoder.layers."
_ATTENTION, _MLP = _LAYER + "self_attention.", _LAYER + "mlp."


@dataclass(frozen=True)
class Key:
    """A global key of a checkpoint."""

    key: str
    shape: Callable[[ModelConfig, int], Shape]
    """Of one layer's part, or of the whole where layers have none; from rows of the vocabulary."""

    @property
    def per_layer(self) -> bool:
        """Whether the tensor has an axis of layers in front."""
        return self.key.startswith(_LAYER)


EMBEDDING = Key("embedding.word_embeddings.weight", lambda m, v: (v, m.hidden))
HEAD = Key("output_layer.weight", lambda m, v: (v, m.hidden))
FINAL_NORM = Key("decoder.final_layernorm.weight", lambda m, v: (m.hidden,))
INPUT_NORM = Key(_ATTENTION + "linear_qkv.layer_norm_weight", lambda m, v: (m.hidden,))
LINEAR_QKV = Key(
    _ATTENTION + "linear_qkv.weight", lambda m, v: (m.query_width + 2 * m.kv_width, m.hidden)
)
LINEAR_PROJ = Key(_ATTENTION + "linear_proj.weight", lambda m, v: (m.hidden, m.query_width))
Q_NORM = Key(_ATTENTION + "q_layernorm.weight", lambda m, v: (m.qk_norm_widths[0],))
K_NORM = Key(_ATTENTION + "k_layernorm.weight", lambda m, v: (m.qk_norm_widths[1],))
MLP_NORM = Key(_LAYER + "pre_mlp_layernorm.weight", lambda m, v: (m.hidden,))
ROUTER = Key(_MLP + "router.weight", lambda m, v: (m.experts, m.hidden))
EXPERT_BIAS = Key(_MLP + "router.expert_bias", lambda m, v: (m.experts,))
FC1 = Key(
    _MLP + "experts.experts.linear_fc1.weight",
    lambda m, v: (m.experts, 2 * m.expert_hidden, m.hidden),
)
FC2 = Key(
    _MLP + "experts.experts.linear_fc2.weight", lambda m, v: (m.experts, m.hidden, m.expert_hidden)
)
SHARED_FC1 = Key(
    _MLP + "shared_experts.linear_fc1.weight", lambda m, v: (2 * m.shared_expert_hidden, m.hidden)
)
SHARED_FC2 = Key(
    _MLP + "shared_experts.linear_fc2.weight", lambda m, v: (m.hidden, m.shared_expert_hidden)
)


@dataclass(frozen=True)
class Entry:
    """A global key and its Hugging Face names, with ``{layer}`` and, one each, ``{expert}``."""

    key: Key
    names: tuple[str, ...]
    transform: Transform = SAME

    @property
    def per_expert(self) -> bool:
        """Whether each expert has tensors of its own."""
        return "{expert}" in self.names[0]

    def layers(self, model: ModelConfig) -> tuple[int | None, ...]:
        """Layers that have a unit of this key."""
        return tuple(range(model.layers)) if self.key.per_layer else (None,)

    def names_of(self, model: ModelConfig, layer: int | None) -> Iterator[tuple[str, ...]]:
        """Names of one unit: of each expert's parts, or of the parts once."""
        for expert in range(model.experts) if self.per_expert else (None,):
            yield tuple(name.format(layer=layer, expert=expert) for name in self.names)

    def shapes(self, model: ModelConfig, vocab: int) -> tuple[Shape, ...]:
        """Shapes of the parts, in the order of the names."""
        whole = self.key.shape(model, vocab)
        whole = whole[1:] if self.per_expert else whole
        rows = self.transform.rows(model)
        return (whole,) if rows is None else tuple((count, *whole[1:]) for count in rows)

    def to_hf(self, unit: Array, model: ModelConfig, layer: int | None) -> Iterator[
        tuple[str, Array]
    ]:  # fmt: skip
        """Names and tensors of one unit."""
        parts = unit if self.per_expert else [unit]
        for whole, names in zip(parts, self.names_of(model, layer), strict=True):
            yield from zip(names, self.transform.split(whole, model), strict=True)

    def to_ours(
        self,
        read: Callable[[str, Shape], tuple[str, Array]],
        model: ModelConfig,
        layer: int | None,
        vocab: int,
        experts: range | None = None,
    ) -> tuple[str, Array]:
        """One unit from its tensors.

        Args:
            read: dtype and values of a name and shape.
            experts: only these, where each has tensors of its own; None is all.

        Raises:
            CheckpointError: parts of one unit have several dtypes.
        """
        shapes = self.shapes(model, vocab)
        chosen = list(self.names_of(model, layer))
        if experts is not None and self.per_expert:
            chosen = chosen[experts.start : experts.stop]
        unit: Array | None = None
        dtype = ""
        for index, names in enumerate(chosen):
            read_parts = [read(name, shape) for name, shape in zip(names, shapes, strict=True)]
            for name, (kind, _) in zip(names, read_parts, strict=True):
                dtype = dtype or kind
                if kind != dtype:
                    raise CheckpointError(
                        name, f"is {kind} and {chosen[0][0]} is {dtype}: one tensor here"
                    )
            whole = self.transform.join(tuple(part for _, part in read_parts), model)
            if not self.per_expert:
                return dtype, whole
            if unit is None:
                unit = np.empty((len(chosen), *whole.shape), whole.dtype)
            unit[index] = whole
        assert unit is not None
        return dtype, unit
