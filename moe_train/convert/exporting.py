"""``export-hf``: a checkpoint of any layout as a Hugging Face folder.

The weights stream through one unit (a key of a layer) at a time; names on disk are those that
Transformers writes, one tensor an expert. Rows that pad the vocabulary stay: they take part in the
softmax of the loss here, so that the exported model has the same logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe_train.checkpoint.manifest import NAME as MANIFEST
from moe_train.checkpoint.weights import WeightsReader
from moe_train.config.root import Config
from moe_train.convert import record
from moe_train.convert.architecture import Architecture, hf_config
from moe_train.convert.card import Facts, model_card
from moe_train.convert.folder import CONFIG, INDEX, SINGLE
from moe_train.convert.importing import complete_folder
from moe_train.convert.record import ExportRecord, Source, TensorRecord
from moe_train.convert.registry import choose
from moe_train.convert.safetensors_file import SafetensorsWriter, layout_files
from moe_train.convert.tensors import EMBEDDING, WIDTHS, Array, Shape
from moe_train.convert.tokenizers import Tokens
from moe_train.convert.values import NAMES, to_raw
from moe_train.errors import CheckpointError

SHARD_BYTES = 5 * 10**9
"""Bytes of a file at most, as Transformers' default."""


@dataclass(frozen=True)
class Exported:
    """What an export has written."""

    folder: Path
    architecture: Architecture
    reasons: list[str]
    """A line for each architecture on why it fits or not."""
    record: ExportRecord
    files: int
    bytes: int


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    config: Config,
    *,
    tokens: Tokens,
    facts: Facts,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Export a checkpoint; ``out`` appears complete or not at all.

    Args:
        config: of the run that wrote the checkpoint.
        tokens: the tokenizer and the ids that config.json names.
        facts: of the training, for the model card.

    Raises:
        ConfigError: the model is of no Hugging Face architecture; says why.
        CheckpointError: the checkpoint is damaged or of another model, or ``out`` exists.
    """
    architecture, reasons = choose(config.model, config.megatron.transformer)
    reader = WeightsReader(checkpoint)
    vocab = reader.shape(EMBEDDING.key)[0]
    _check_keys(reader, architecture, config, vocab)
    dtype = str(reader.dtype(EMBEDDING.key)).removeprefix("torch.")
    with complete_folder(out) as staging:
        tensors, total = _write_weights(reader, architecture, config, vocab, staging, shard_bytes)
        fields = hf_config(architecture, config.model, vocab, dtype, tokens.positions)
        fields |= tokens.ids
        _write(staging / CONFIG, fields)
        _write(staging / "generation_config.json", tokens.generation)
        for name, content in tokens.files.items():
            (staging / name).write_bytes(content)
        card = model_card(architecture, config, vocab, facts, record.weights_digest(tensors))
        (staging / "README.md").write_text(card, encoding="utf-8")
        weights = {one.file for one in tensors.values()}
        # The card is there to be edited.
        rest = sorted(p for p in staging.iterdir() if p.name not in {*weights, "README.md"})
        written = ExportRecord(
            architecture=architecture.name,
            weights_sha256=record.weights_digest(tensors),
            source=_source(checkpoint, reader),
            versions={name: version(name) for name in ("moe-train", "torch", "numpy")},
            files={path.name: record.file_digest(path) for path in rest},
            tensors=tensors,
        )
        written.write(staging)
    return Exported(out, architecture, reasons, written, len(weights), total)


def tensors_of(
    reader: WeightsReader,
    architecture: Architecture,
    config: Config,
    vocab: int,
    stacked: bool = False,
) -> Iterator[tuple[str, str, Array]]:
    """Names, dtypes and values of all tensors of a checkpoint under their Hugging Face names.

    Args:
        stacked: names as in Transformers' memory, with all experts of a layer in one tensor.

    Raises:
        CheckpointError: an item is damaged.
    """
    for entry, layer in architecture.tensors(config.model, stacked):
        unit = reader.read(entry.key.key, layer)
        dtype = NAMES[unit.dtype]
        for name, values in entry.to_hf(to_raw(unit), config.model, layer):
            yield name, dtype, values


def _check_keys(
    reader: WeightsReader, architecture: Architecture, config: Config, vocab: int
) -> None:
    """The checkpoint has the tensors of the model, with their shapes, and no others."""
    entries = architecture.entries(config.model, False)
    known = {entry.key.key for entry in entries}
    fix = "give the overrides of the run that wrote it, such as model=PATH"
    if left := sorted(reader.keys() - known):
        raise CheckpointError(
            left[0], f"is in {reader.folder} and in no {architecture.title} of this config", fix
        )
    for entry in entries:
        shape = entry.key.shape(config.model, vocab)
        shape = (config.model.layers, *shape) if entry.key.per_layer else shape
        if reader.shape(entry.key.key) != shape:
            raise CheckpointError(
                entry.key.key,
                f"has shape {reader.shape(entry.key.key)}, and the config makes it {shape}",
                fix,
            )
        if reader.dtype(entry.key.key) not in NAMES:
            raise CheckpointError(entry.key.key, f"is {reader.dtype(entry.key.key)}")


def _write_weights(
    reader: WeightsReader,
    architecture: Architecture,
    config: Config,
    vocab: int,
    staging: Path,
    shard_bytes: int,
) -> tuple[dict[str, TensorRecord], int]:
    shapes: list[tuple[str, str, Shape]] = []
    for entry, layer in architecture.tensors(config.model):
        dtype = NAMES[reader.dtype(entry.key.key)]
        for names in entry.names_of(config.model, layer):
            parts = zip(names, entry.shapes(config.model, vocab), strict=True)
            shapes += [(name, dtype, shape) for name, shape in parts]
    files = layout_files(shapes, shard_bytes)
    count = len(files)
    titles = [SINGLE] if count == 1 else [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]  # fmt: skip
    stream = tensors_of(reader, architecture, config, vocab)
    tensors: dict[str, TensorRecord] = {}
    total = 0
    for title, content in zip(titles, files, strict=True):
        writer = SafetensorsWriter(staging / title, content)
        try:
            for _ in content:
                name, dtype, values = next(stream)
                digest = writer.write(name, dtype, values)
                tensors[name] = TensorRecord(title, dtype, list(values.shape), digest)
                total += values.size * WIDTHS[dtype]
        except BaseException:
            writer.close(complete=False)
            raise
        writer.close()
    if count > 1:
        places = {name: one.file for name, one in tensors.items()}
        _write(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return tensors, total


def _source(checkpoint: Path, reader: WeightsReader) -> Source:
    manifest = reader.manifest
    path = checkpoint.resolve()
    return Source(
        checkpoint=f"{path.parent.parent.name}/{path.name}",
        step=manifest.step,
        layout=manifest.layout,
        manifest_sha256=record.file_digest(checkpoint / MANIFEST),
    )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
