"""A Hugging Face folder, opened: its config.json understood, every tensor accounted for.

Only JSON and safetensors are read. Nothing is guessed: a tensor that is missing, left over, of
another shape or in another file than the index says ends the reading by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue

from moe_train.config.model import ModelConfig
from moe_train.config.root import Config
from moe_train.config.schema import from_mapping
from moe_train.config.validate import validate
from moe_train.convert.architecture import Architecture, model_mapping
from moe_train.convert.registry import ARCHITECTURES, architecture_of
from moe_train.convert.safetensors_file import Stored, read_header, read_rows
from moe_train.convert.tensors import WIDTHS, Array, Entry, Shape
from moe_train.errors import CheckpointError, ConfigError
from moe_train.files import read_validated

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_SHARD = re.compile(r"[A-Za-z0-9_.-]{1,200}\.safetensors", re.ASCII)
_LIMIT = 64 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_LEFT_OVER = "use a folder of this architecture as Transformers' save_pretrained writes it"


def is_hf_folder(path: Path) -> bool:
    """Whether a folder looks like a Hugging Face model's."""
    return (path / CONFIG).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of limited size.

    Raises:
        CheckpointError: missing, too large, damaged, or something else.
    """
    return read_validated(
        path,
        dict[str, JsonValue],
        limit=_LIMIT,
        what="a JSON object",
        error=CheckpointError,
        fix="the folder is damaged or incomplete",
        follow_links=True,
    )


@dataclass(frozen=True)
class HfFolder:
    """A folder whose tensors are known and complete."""

    path: Path
    config: Mapping[str, Any]
    """config.json."""
    architecture: Architecture
    model: ModelConfig
    stacked: bool
    """Whether a layer's experts are in one tensor."""
    tensors: Mapping[str, Stored]

    @property
    def vocab(self) -> int:
        """Rows of the embedding."""
        assert self.model.vocab is not None
        return self.model.vocab

    def units(self) -> Iterator[tuple[str, int | None]]:
        """Global keys, and the layer of each unit, layer by layer."""
        for entry, layer in self.architecture.tensors(self.model, self.stacked):
            yield entry.key.key, layer

    def shape(self, key: str) -> Shape:
        """Global shape of a key, with its axis of layers."""
        entry = self._entries[key]
        inner = entry.key.shape(self.model, self.vocab)
        return (self.model.layers, *inner) if entry.key.per_layer else inner

    def dtype(self, key: str) -> str:
        """The dtype of a key, by safetensors' name; the first layer's."""
        entry = self._entries[key]
        first = next(entry.names_of(self.model, entry.layers(self.model)[0]))
        return self.tensors[first[0]].dtype

    def read(
        self, key: str, layer: int | None, experts: range | None = None
    ) -> tuple[str, Array]:  # fmt: skip
        """Dtype and values, as unsigned integers, of one unit; of some experts, if given.

        Raises:
            CheckpointError: a file is damaged, or parts have several dtypes.
        """
        entry = self._entries[key]

        def tensor(name: str, shape: Shape) -> tuple[str, Array]:
            stored = self.tensors[name]
            if experts is not None and not entry.per_expert:
                return stored.dtype, read_rows(stored, experts.start, experts.stop)
            return stored.dtype, read_rows(stored)

        return entry.to_ours(tensor, self.model, layer, self.vocab, experts)

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return {e.key.key: e for e in self.architecture.entries(self.model, self.stacked)}


def open_folder(path: Path) -> HfFolder:
    """Open a Hugging Face folder, and check it without reading a tensor.

    Raises:
        ConfigError: config.json describes a model that is not built here; names the field.
        CheckpointError: the folder is damaged, incomplete or has tensors that nothing uses.
    """
    if not is_hf_folder(path):
        raise CheckpointError(
            str(path), f"has no {CONFIG}", "give a folder that save_pretrained or export-hf wrote"
        )
    _check_links(path)
    config = read_json(path / CONFIG)
    try:
        architecture = architecture_of(config)
        model = model_of(model_mapping(architecture, config))
    except ConfigError as misfit:
        # The user has config.json before them, not the keys that follow from it.
        fields = ARCHITECTURES[config["model_type"]].fields if misfit.field[:6] == "model." else ()
        names = {f"model.{one.ours}": one.name for one in fields}
        field = f"{path / CONFIG}: {names.get(misfit.field, misfit.field)}"
        raise ConfigError(field, misfit.problem, misfit.fix) from misfit
    tensors = _tensors(path)
    assert model.vocab is not None
    stacked = not any(".experts.0." in name for name in tensors)
    expected = architecture.expected(model, model.vocab, stacked)
    _check(path, tensors, expected, model)
    return HfFolder(path, config, architecture, model, stacked, tensors)


def _check_links(path: Path) -> None:
    """Links lead to the blobs of Hugging Face's cache, or nowhere: what they name is copied."""
    folder = path.resolve()
    blobs = folder.parents[1] / "blobs" if len(folder.parents) > 1 else None
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and file.resolve().parent != blobs:
            raise CheckpointError(
                str(path / file.name), "is a link out of the folder", "copy the file itself"
            )


def model_of(mapping: Mapping[str, Any]) -> ModelConfig:
    """The model of dotted keys of its group, checked.

    Raises:
        ConfigError: the first value that is refused.
    """
    nested: dict[str, Any] = {"router": {}}
    for key, value in mapping.items():
        group, _, name = key.rpartition(".")
        (nested[group] if group else nested)[name] = value
    config, faults = from_mapping(Config, {"model": nested})
    faults += [fault for fault in validate(config) if fault.field.startswith("model.")]
    if faults:
        raise faults[0]
    return config.model


def _tensors(path: Path) -> dict[str, Stored]:
    """All tensors of the folder's safetensors files, by name."""
    if (path / INDEX).exists():
        named = read_json(path / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise CheckpointError(str(path / INDEX), "has no weight_map", _LEFT_OVER)
        files = {str(name): str(file) for name, file in named.items()}
    else:
        if not (path / SINGLE).exists():
            pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
            pickled = f", and {pickles[0]} is a pickle, which is never read" if pickles else ""
            raise CheckpointError(
                str(path), f"has neither {SINGLE} nor {INDEX}{pickled}", "convert it to safetensors"
            )
        files = {}
    for file in files.values():
        # A name with a folder in it could lead anywhere.
        if not _SHARD.fullmatch(file):
            raise CheckpointError(str(path / INDEX), f"{file[:80]!r} is no name of a shard")
    tensors: dict[str, Stored] = {}
    for file in sorted(set(files.values())) or [SINGLE]:
        if not (path / file).exists():
            raise CheckpointError(str(path / file), "is missing", "fetch the folder again")
        for name, stored in read_header(path / file).items():
            if name in tensors:
                raise CheckpointError(name, f"is in {tensors[name].path.name} and in {file}")
            if files and files.get(name) != file:
                raise CheckpointError(name, f"is in {file}, and {INDEX} says {files.get(name)}")
            tensors[name] = stored
    if missing := files.keys() - tensors.keys():
        raise CheckpointError(min(missing), f"is in {INDEX} and in no file", _LEFT_OVER)
    return tensors


def _check(
    path: Path, tensors: Mapping[str, Stored], expected: Mapping[str, Shape], model: ModelConfig
) -> None:
    """Every expected tensor is there with its shape, and no other."""
    if missing := [name for name in expected if name not in tensors]:
        raise CheckpointError(
            missing[0], f"is not in {path} ({len(missing)} of {len(expected)} missing)", _LEFT_OVER
        )
    left = sorted(tensors.keys() - expected.keys())
    if model.tied_embeddings and "lm_head.weight" in left:
        _check_tied(tensors)
        left.remove("lm_head.weight")
    if left:
        raise CheckpointError(
            left[0], f"is a tensor that nothing here uses ({len(left)} of {path})", _LEFT_OVER
        )
    for name, shape in expected.items():
        stored = tensors[name]
        if stored.shape != shape:
            raise CheckpointError(
                name, f"has shape {list(stored.shape)}, and config.json makes it {list(shape)}"
            )
        if stored.dtype not in WIDTHS:
            raise CheckpointError(
                name, f"is {stored.dtype}; weights are one of {', '.join(WIDTHS)}", _LEFT_OVER
            )


def _check_tied(tensors: Mapping[str, Stored]) -> None:
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not same or not np.array_equal(read_rows(head), read_rows(embedding)):
        raise CheckpointError(
            "lm_head.weight",
            "differs from model.embed_tokens.weight, which tie_word_embeddings makes the head",
            "set tie_word_embeddings to false, or remove the one that is wrong",
        )
