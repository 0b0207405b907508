"""Manifest of a prepared dataset: ``PREFIX.json``, next to its .bin and .idx files."""

from __future__ import annotations

from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

from moe_train.data import tokenizer as tokenizers
from moe_train.errors import DataError
from moe_train.files import Count, read_validated, write_json

FORMAT: Final = 1
MAX_BYTES = 256 * 2**20
BLOCK = 16 * 2**20
"""Bytes of .bin that one digest of ``bin_blocks`` covers."""


def dataset_file(prefix: Path, ending: str) -> Path:
    """``PREFIX`` + ending; a dot inside the prefix's name is part of the name."""
    return prefix.with_name(prefix.name + ending)


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Manifest:
    """Contents of ``PREFIX.json``, all derived from the dataset."""

    documents: Count
    tokens: Count
    skipped_documents: Count
    """Input documents without text."""
    vocab_size: Count
    max_token_id: Count
    dtype: str
    eod: Count | None
    appended_eod: bool
    tokenizer: str
    """byte, or file: the tokenizer is then in PREFIX.tokenizer.json."""
    tokenizer_fingerprint: str
    unigram_entropy: float
    """nats per token over the whole dataset."""
    bin_bytes: Count
    bin_sha256: str
    idx_bytes: Count
    idx_sha256: str
    sources: list[dict[str, Any]] = field(default_factory=list)
    """path, bytes, sha256, documents and tokens of every input file, in order."""
    format: Literal[1] = FORMAT
    bin_blocks: list[str] = field(default_factory=list)
    """SHA-256 of every `BLOCK` of .bin, so that damage can be located; empty in older data."""

    @model_validator(mode="after")
    def _digests_cover_tokens(self) -> Self:
        if len(self.bin_blocks) not in (0, -(-self.bin_bytes // BLOCK)):
            raise ValueError("bin_blocks is not one digest for each block of bin_bytes")
        return self

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        write_json(path, asdict(self))

    def open_tokenizer(self, prefix: Path) -> tokenizers.Tokenizer:
        """The tokenizer that the dataset was prepared with.

        Raises:
            DataError: its copy is missing or is not the one that the manifest names.
        """
        copy = dataset_file(prefix, ".tokenizer.json")
        source = "byte" if self.tokenizer == "byte" else str(copy)
        opened = tokenizers.load(source)
        if opened.fingerprint != self.tokenizer_fingerprint:
            raise DataError(
                source,
                f"({opened.fingerprint[:12]}) is not the tokenizer that {prefix} was prepared with "
                f"({self.tokenizer_fingerprint[:12]})",
                "restore the file or prepare the data again",
            )
        return opened


def read_manifest(prefix: Path) -> Manifest | None:
    """The manifest of a prefix; None where there is none (data prepared by Megatron's tools).

    Raises:
        DataError: there is one, but it cannot be read or is of another format.
    """
    path = dataset_file(prefix, ".json")
    if not path.exists():
        return None
    return read_validated(
        path,
        Manifest,
        limit=MAX_BYTES,
        what=f"a dataset's manifest of format {FORMAT}",
        error=DataError,
        fix="prepare the data again",
        follow_links=True,
    )
