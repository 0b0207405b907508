"""The manifest: what a checkpoint is, and the size and SHA-256 of every file in it.

It is JSON, written last; a folder without a matching manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_train.errors import CheckpointError

FORMAT = 1
NAME = "manifest.json"
MAX_BYTES = 64 * 2**20


@dataclass
class Manifest:
    """Contents of ``manifest.json``."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    model: dict[str, Any]
    """Fields that fix the shapes of the weights."""
    layout: str
    world: int
    seed: int
    optimizer_step: int
    optimizer_states: list[str]
    """Per-parameter tensors: exp_avg, exp_avg_sq and, for low-precision weights, param."""
    tokenizer: str
    """Fingerprint of the tokenizer that the data was prepared with."""
    rng_sizes: list[int]
    """Bytes of each random state of a rank, in the order they were joined."""
    format: int = FORMAT
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Relative name -> {size, sha256}."""

    def write(self, folder: Path) -> None:
        """Write to ``folder`` and flush it to the disk."""
        path = folder / NAME
        with open(path, "w", encoding="utf-8") as out:
            json.dump(asdict(self), out, indent=1, sort_keys=True)
            out.flush()
            os.fsync(out.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a committed checkpoint.

    Raises:
        CheckpointError: missing, too large, not JSON, of another format or incomplete.
    """
    path = folder / NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(str(path), f"larger than {MAX_BYTES} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise CheckpointError(
            str(path), f"cannot be read: {problem}", "the folder is not a complete checkpoint"
        ) from problem
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise CheckpointError(str(path), f"is not a manifest of format {FORMAT}")
    try:
        manifest = Manifest(**raw)
    except TypeError as problem:
        raise CheckpointError(str(path), f"has missing or unknown fields: {problem}") from problem
    _check_types(path, manifest)
    return manifest


def _check_types(path: Path, manifest: Manifest) -> None:
    numbers = ("step", "consumed_samples", "consumed_tokens", "world", "seed", "optimizer_step")
    for name in numbers:
        value = getattr(manifest, name)
        if type(value) is not int or value < 0:
            raise CheckpointError(str(path), f"{name} is {value!r}, not a count")
    if not isinstance(manifest.model, dict) or not isinstance(manifest.files, dict):
        raise CheckpointError(str(path), "model and files must be objects")
    for sequence in (manifest.optimizer_states, manifest.rng_sizes):
        if not isinstance(sequence, list):
            raise CheckpointError(str(path), "optimizer_states and rng_sizes must be lists")
    for name, facts in manifest.files.items():
        plain = Path(name).name == name and name not in ("", ".", "..")
        known = isinstance(facts, dict) and type(facts.get("size")) is int
        if not plain or not known or not isinstance(facts.get("sha256"), str):
            raise CheckpointError(str(path), f"entry {name!r} is not a plain file with facts")


def file_facts(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of one file."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def verify(folder: Path, deep: bool = True) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Args:
        deep: compare hashes too, not sizes alone.

    Raises:
        CheckpointError: names the first file that is missing, a link, or different.
    """
    manifest = read_manifest(folder)
    if not manifest.files:
        raise CheckpointError(str(folder), "its manifest lists no files")
    for name, facts in sorted(manifest.files.items()):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(str(path), "is missing or not a plain file", _FALL_BACK)
        if path.stat().st_size != facts["size"]:
            raise CheckpointError(
                str(path), f"has {path.stat().st_size} bytes, not {facts['size']}", _FALL_BACK
            )
        if deep and file_facts(path)["sha256"] != facts["sha256"]:
            raise CheckpointError(str(path), "does not match its SHA-256", _FALL_BACK)
    return manifest


_FALL_BACK = "resume from an older checkpoint: checkpoint.resume=PATH"


def merged(parts: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One ``files`` table from the ranks' parts."""
    return {name: facts for part in parts for name, facts in part.items()}
