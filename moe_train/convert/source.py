"""What is exported: a run's newest checkpoint or a named one, its config and its tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from moe_train.checkpoint import folders
from moe_train.checkpoint.manifest import NAME, Manifest, read_manifest
from moe_train.config.compose import compose
from moe_train.config.files import read_config
from moe_train.config.root import Config, MegatronConfig
from moe_train.config.schema import from_mapping
from moe_train.convert.card import Facts
from moe_train.convert.tokenizers import Tokens, tokenizer_of_run, tokens_of, tokens_of_import
from moe_train.data import tokenizer as data_tokenizers
from moe_train.errors import CheckpointError, ConfigError, ConfigFaults
from moe_train.run_folder import metrics
from moe_train.run_folder.folder import RunFolder


@dataclass(frozen=True)
class Source:
    """A checkpoint, and what its run folder says of it."""

    root: Path
    """The run folder, or what takes its place."""
    checkpoint: Path
    manifest: Manifest
    config: Config
    facts: Facts


def open_source(path: Path, overrides: Sequence[str] = ()) -> Source:
    """The checkpoint of a run folder or of its own folder.

    Args:
        overrides: of the config, over what the run folder says; without a run folder they have to
            describe the model.

    Raises:
        CheckpointError: there is no committed checkpoint.
        ConfigError: the config is refused.
    """
    run = RunFolder(path)
    if run.checkpoints.is_dir():
        committed = folders.committed(run.checkpoints)
        if not committed:
            raise CheckpointError(str(path), "has no committed checkpoint", "train until one is")
        root, checkpoint = path, committed[0]
    elif (path / NAME).is_file():
        root, checkpoint = path.absolute().parent.parent, path
    else:
        raise CheckpointError(
            str(path), "is neither a run folder nor a checkpoint", "such as runs/NAME"
        )
    manifest = read_manifest(checkpoint)
    config = _config(RunFolder(root).config, overrides)
    return Source(root, checkpoint, manifest, config, _facts(RunFolder(root), manifest))


def _config(path: Path, overrides: Sequence[str]) -> Config:
    if not path.is_file():
        if not any(one.lstrip("+").startswith("model") for one in overrides):
            raise CheckpointError(
                str(path), "is missing: the model of the checkpoint is not known",
                "give it, such as model=PATH.yaml",
            )  # fmt: skip
        return compose(["recompute=none", *overrides])
    mapping = read_config(path)
    config, faults = from_mapping(Config, mapping)
    if faults:
        raise ConfigFaults(faults)
    if not overrides:
        return config
    chosen = {one.partition("=")[0].lstrip("+") for one in overrides}
    with tempfile.TemporaryDirectory(prefix="moe-train-") as folder:
        groups = []
        for group in ("model", "data"):
            if isinstance(mapping.get(group), dict) and group not in chosen:
                file = Path(folder) / f"{group}.yaml"
                file.write_text(yaml.safe_dump(mapping[group]), encoding="utf-8")
                groups.append(f"{group}={file}")
        dtype = [] if "dtype" in chosen else [f"dtype={config.dtype}"]
        other = compose(["recompute=none", *groups, *dtype, *overrides])
    # Options of the router that no architecture has can be left out of an export.
    if replace(other.model, router=config.model.router) != config.model:
        raise ConfigError(
            "model",
            f"differs from the model that was trained, of {path}",
            "leave out overrides of model: a run's weights mean nothing in another model",
        )
    megatron = {**config.megatron.transformer, **other.megatron.transformer}
    return replace(
        config,
        model=other.model,
        data=other.data,
        dtype=other.dtype,
        megatron=MegatronConfig(transformer=megatron),
    )


def _facts(run: RunFolder, manifest: Manifest) -> Facts:
    losses: dict[str, float] = {}
    for line in metrics.read(run.metrics):
        if line["step"] <= manifest.step:
            losses |= {
                key: line[key] for key in ("loss", "valid_loss") if line.get(key) is not None
            }
    return Facts(
        step=manifest.step,
        tokens=manifest.consumed_tokens,
        layout=manifest.layout,
        training_loss=losses.get("loss"),
        validation_loss=losses.get("valid_loss"),
    )


def tokens_for(source: Source, given: str | None) -> Tokens:
    """The tokenizer of an export: of the import that the checkpoint is of, or of the run's data.

    Args:
        given: ``byte``, a tokenizer.json, or ``none``.

    Raises:
        DataError: there is no such tokenizer, or the run's data are not there.
        CheckpointError: it is not the one that the checkpoint was trained with.
    """
    positions = source.config.data.sequence
    if given == "none":
        return Tokens(positions=positions)
    if given is None and (imported := tokens_of_import(source.root)) is not None:
        return imported if imported.positions else replace(imported, positions=positions)
    tokenizer = data_tokenizers.load(given) if given else tokenizer_of_run(source.config)
    expected = source.manifest.tokenizer
    if expected not in ("unknown", tokenizer.fingerprint):
        raise CheckpointError(
            str(source.checkpoint),
            f"was trained with another tokenizer ({expected[:12]}) than {tokenizer.describe()} "
            f"({tokenizer.fingerprint[:12]})",
            "--tokenizer FILE, or --tokenizer none to export the model alone",
        )
    return tokens_of(tokenizer, positions)
