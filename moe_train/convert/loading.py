"""Loads a Hugging Face folder into a model of any layout, each rank its own part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from math import prod
from typing import Any

import numpy as np
import torch

from moe_train.checkpoint.load import local_sizes
from moe_train.checkpoint.shards import shards_of
from moe_train.checkpoint.staging import Staging
from moe_train.checkpoint.state_dict import model_state, sharded_model_state
from moe_train.config.model import ModelConfig
from moe_train.convert.folder import HfFolder
from moe_train.convert.tensors import FC1, FC2
from moe_train.convert.values import to_torch
from moe_train.errors import CheckpointError, ConfigError

_FREE = {"name", "vocab", "vocab_multiple", "init_std"}
_FREE_ROUTER = {
    *("balancing", "aux_coeff", "z_coeff", "expert_bias_rate"),
    *("force_balance", "drop_policy", "pad_to_capacity"),
}
"""Keys that a run may choose: they change no logit, or only while training."""


def check_model(folder: HfFolder, model: ModelConfig, padded_vocab: int) -> None:
    """Refuse a run whose model is not that of the folder, before anything is loaded.

    Raises:
        ConfigError: names the first key that differs.
    """
    theirs = folder.model
    pairs = [
        (f"model.{prefix}{one.name}", getattr(ours, one.name), getattr(there, one.name))
        for prefix, ours, there, free in (
            ("", model, theirs, {*_FREE, "router", "kv_heads", "head_dim"}),
            ("router.", model.router, theirs.router, _FREE_ROUTER),
        )
        for one in fields(ours)
        if one.name not in free
    ]
    pairs += [
        ("model.kv_heads", model.num_query_groups, theirs.num_query_groups),
        ("model.head_dim", model.kv_channels, theirs.kv_channels),
        ("model.vocab", padded_vocab, folder.vocab),
    ]
    for key, ours, there in pairs:
        if ours != there and not {ours, there} <= {None, 1.0}:
            raise ConfigError(
                key,
                f"{ours!r} and {there!r} in {folder.path}",
                f"import it (moe-train import-hf) and train with its model file, or set {key}",
            )


@torch.no_grad()
def load_weights(folder: HfFolder, chunks: Sequence[Any]) -> None:
    """Set the weights of this rank's model chunks; values are cast to their dtype.

    Ranks read the folder each for itself, and take no part in a collective. Whoever calls this
    sets the optimizer's master copies from the weights afterwards.

    Raises:
        CheckpointError: a file is damaged, or the model has a tensor of another name or shape.
    """
    state = model_state(list(chunks), sharded_model_state(chunks))
    through, units = Staging(), _Units(folder)
    known = {key for key, _ in folder.units()}
    for shard in shards_of(state):
        buffer = shard.load_buffer()
        for tensor in shard.sharded_tensors(buffer):
            key, shape = tensor.key, tuple(tensor.global_shape)
            if key not in known:
                raise CheckpointError(key, f"is a tensor of this model and not of {folder.path}")
            if folder.shape(key) != shape:
                raise CheckpointError(
                    key, f"has shape {folder.shape(key)} in {folder.path} and {shape} here"
                )
            sizes = local_sizes(tensor)
            place = tuple(
                slice(begin, begin + size)
                for begin, size in zip(tensor.global_offset, sizes, strict=True)
            )
            assert tensor.data is not None and tensor.data.numel() == prod(sizes)
            through.to_live(units.part(key, place).view(tensor.data.shape), tensor.data)
        shard.store(buffer, through)


class _Units:
    """Parts of global tensors; the last unit stays in memory, since the next part may be of it."""

    def __init__(self, folder: HfFolder) -> None:
        self._folder = folder
        self._last: tuple[Any, torch.Tensor] | None = None

    def part(self, key: str, place: tuple[slice, ...]) -> torch.Tensor:
        """Values at a place of a global tensor; contiguous."""
        if not key.startswith("decoder.layers."):
            return self._unit(key, None, None)[place].contiguous()
        layers, inner = range(place[0].start, place[0].stop), place[1:]
        experts = None
        if key in (FC1.key, FC2.key):
            experts, inner = range(inner[0].start, inner[0].stop), (slice(None), *inner[1:])
        return torch.stack([self._unit(key, layer, experts)[inner] for layer in layers])

    def _unit(self, key: str, layer: int | None, experts: range | None) -> torch.Tensor:
        name = key, layer, experts
        if self._last is None or self._last[0] != name:
            self._last = None
            dtype, values = self._folder.read(key, layer, experts)
            self._last = name, to_torch(dtype, np.ascontiguousarray(values))
        return self._last[1]
