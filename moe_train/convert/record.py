"""``moe_train_export.json``: what an export wrote, so that anyone can check it without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from moe_train.errors import CheckpointError
from moe_train.files import read_validated

NAME = "moe_train_export.json"
_LIMIT = 256 << 20

type Sha256 = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
type FileName = Annotated[str, Field(pattern=r"\A[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}\z")]


@dataclass(config=ConfigDict(strict=True, extra="forbid"))
class TensorRecord:
    """One tensor of the folder."""

    file: FileName
    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    sha256: Sha256


@dataclass(config=ConfigDict(strict=True, extra="forbid"))
class Source:
    """The checkpoint that was exported."""

    checkpoint: str
    """Run and checkpoint folder."""
    step: int
    layout: str
    manifest_sha256: Sha256


@dataclass(config=ConfigDict(strict=True, extra="forbid"))
class ExportRecord:
    """Contents of the file."""

    architecture: str
    weights_sha256: Sha256
    """Over names, dtypes, shapes and digests of all tensors: the same from every layout."""
    source: Source
    versions: dict[str, str]
    files: dict[FileName, Sha256]
    """Every other file of the folder but the model card."""
    tensors: dict[str, TensorRecord]
    format: Literal[1] = 1

    def write(self, folder: Path) -> None:
        """Write it to ``folder``."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
        (folder / NAME).write_text(text, encoding="utf-8")


def weights_digest(tensors: Mapping[str, TensorRecord]) -> str:
    """`ExportRecord.weights_sha256`; which file holds a tensor does not matter."""
    lines = [
        f"{name} {one.dtype} {one.shape} {one.sha256}\n" for name, one in sorted(tensors.items())
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(folder: Path) -> ExportRecord:
    """The record of an exported folder.

    Raises:
        CheckpointError: missing, damaged or of another format.
    """
    return read_validated(
        folder / NAME,
        ExportRecord,
        limit=_LIMIT,
        what="an export record of format 1",
        error=CheckpointError,
        fix="only folders that export-hf wrote can be verified; --roundtrip checks any",
    )
