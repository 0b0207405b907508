"""``import-hf``: a Hugging Face folder as a checkpoint of weights and a model file.

The result is laid out like a run folder, so that whatever takes one takes it:

    checkpoints/step_00000000/   the weights, bit for bit, in the dtype of the folder
    config.yaml                  the whole config with the folder's model
    model.yaml                   the model group alone: ``model=PATH``
    huggingface.json             config.json and generation_config.json as they were
    tokenizer.json, ...          as they were
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from moe_train.checkpoint.manifest import identity
from moe_train.checkpoint.weights import WeightsWriter
from moe_train.config.root import Config
from moe_train.config.schema import to_mapping
from moe_train.convert.folder import HfFolder, open_folder, read_json
from moe_train.convert.tensors import EXPERT_BIAS
from moe_train.convert.tokenizers import FILES, ORIGIN
from moe_train.convert.values import DTYPES, to_torch
from moe_train.data.tokenizer import FileTokenizer
from moe_train.errors import CheckpointError, DataError
from moe_train.files import write_json
from moe_train.run_folder.folder import RunFolder

MODEL_FILE = "model.yaml"
_MAX_TOKENIZER = 256 << 20

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Imported:
    """What an import has written."""

    folder: Path
    checkpoint: Path
    model_file: Path
    tokenizer: Path | None
    architecture: str
    stacked: bool
    tensors: int
    bytes: int


def import_folder(source: Path, out: Path) -> Imported:
    """Import a Hugging Face folder; ``out`` appears complete or not at all.

    Raises:
        ConfigError: config.json describes a model that is not built here.
        CheckpointError: the folder is damaged or incomplete, or ``out`` exists or is not writable.
    """
    folder = open_folder(source)
    with complete_folder(out) as staging:
        tokenizer, fingerprint = _copy_tokenizer(source, staging)
        checkpoint = write_checkpoint(folder, RunFolder(staging).checkpoints, fingerprint)
        _write_config(folder, staging, out)
    return Imported(
        out,
        RunFolder(out).checkpoints / checkpoint.name,
        out / MODEL_FILE,
        out / tokenizer if tokenizer else None,
        folder.architecture.title,
        folder.stacked,
        len(folder.tensors),
        sum(one.end - one.begin for one in folder.tensors.values()),
    )


@contextmanager
def complete_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out``, which gets its name when it is complete.

    Raises:
        CheckpointError: ``out`` is there already, or cannot be written.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(str(out), "exists already", "give the name of a new folder")
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True)
        yield staging
        handle = os.open(staging, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    except OSError as problem:
        raise CheckpointError(str(out), f"cannot be written: {problem}") from problem
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_checkpoint(folder: HfFolder, root: Path, tokenizer: str = "unknown") -> Path:
    """Write the weights of a folder as a checkpoint, a layer of one key at a time.

    Args:
        root: where checkpoints lie.
        tokenizer: fingerprint of the folder's tokenizer.

    Raises:
        CheckpointError: a file is damaged, or the disk refuses.
    """
    keys = dict.fromkeys(key for key, _ in folder.units())
    shapes = {key: (DTYPES[folder.dtype(key)], folder.shape(key)) for key in keys}
    writer = WeightsWriter(root, shapes)
    try:
        for key, layer in folder.units():
            dtype, values = folder.read(key, layer)
            if DTYPES[dtype] != shapes[key][0]:
                raise CheckpointError(
                    f"{key} of layer {layer}", f"is {dtype} and {folder.dtype(key)} in layer 0"
                )
            if key == EXPERT_BIAS.key and dtype != "F32":
                raise CheckpointError(key, f"is {dtype}; the bias of a router is F32")
            place = [0] * len(shapes[key][1])
            if layer is not None:
                place[0] = layer
            writer.write(key, place, to_torch(dtype, values))
        return writer.commit(
            consumed_samples=0,
            consumed_tokens=0,
            model=identity(folder.model, folder.vocab),
            layout="single",
            world=1,
            seed=0,
            tokenizer=tokenizer,
        )
    except BaseException:
        writer.discard()
        raise


def _copy_tokenizer(source: Path, target: Path) -> tuple[str | None, str]:
    """Copy the tokenizer's files; name of its tokenizer.json, and its fingerprint.

    Raises:
        CheckpointError: a file is damaged.
    """
    for name in FILES:
        path = source / name
        if not path.is_file():
            continue
        if path.stat().st_size > _MAX_TOKENIZER:
            raise CheckpointError(str(path), f"is larger than {_MAX_TOKENIZER} bytes")
        if name == "tokenizer_config.json" and "auto_map" in read_json(path):
            LOGGER.warning("%s names code of its own, and is left out", path)
            continue
        shutil.copyfile(path, target / name)
    if not (target / "tokenizer.json").exists():
        return None, "unknown"
    try:
        return "tokenizer.json", FileTokenizer(target / "tokenizer.json").fingerprint
    except DataError as problem:
        raise CheckpointError(problem.field, problem.problem, problem.fix) from problem


def _write_config(folder: HfFolder, staging: Path, out: Path) -> None:
    config = Config(
        experiment=out.name,
        dtype="fp32" if folder.dtype(next(folder.units())[0]) == "F32" else "bf16",
        model=folder.model,
    )
    if (staging / "tokenizer.json").exists():
        tokenizer = str(out.absolute() / "tokenizer.json")
        config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    mapping = to_mapping(config)
    RunFolder(staging).write_config(mapping)
    about = (
        f"# {folder.architecture.title} from config.json. Balancing is that of Transformers'\n"
        "# training: a loss only where output_router_logits says so.\n"
    )
    text = about + yaml.safe_dump(mapping["model"], sort_keys=False)
    (staging / MODEL_FILE).write_text(text, encoding="utf-8")
    origin: dict[str, Any] = {"config": dict(folder.config)}
    if (folder.path / "generation_config.json").is_file():
        origin["generation_config"] = read_json(folder.path / "generation_config.json")
    write_json(staging / ORIGIN, origin)
