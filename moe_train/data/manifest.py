"""What a prepared dataset says about itself: ``PREFIX.json`` beside .bin and .idx."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moe_train.data import tokenizer as tokenizers
from moe_train.errors import DataError

FORMAT = 1
MAX_BYTES = 256 * 2**20
BLOCK = 16 * 2**20
"""Bytes of .bin that one digest of ``bin_blocks`` stands for."""
_COUNTS = (
    *("documents", "tokens", "skipped_documents", "vocab_size", "max_token_id"),
    *("bin_bytes", "idx_bytes"),
)
_TEXTS = ("dtype", "tokenizer", "tokenizer_fingerprint", "bin_sha256", "idx_sha256")


def beside(prefix: Path, ending: str) -> Path:
    """``PREFIX`` + ending; a dot inside the prefix's name is part of the name."""
    return prefix.with_name(prefix.name + ending)


@dataclass(frozen=True)
class Manifest:
    """Facts of one prepared dataset, all derived from its content."""

    documents: int
    tokens: int
    skipped_documents: int
    """Input documents without text."""
    vocab_size: int
    max_token_id: int
    dtype: str
    eod: int | None
    appended_eod: bool
    tokenizer: str
    """byte, or file: the tokenizer is then in PREFIX.tokenizer.json."""
    tokenizer_fingerprint: str
    unigram_entropy: float
    """nats per token over the whole dataset."""
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    sources: list[dict[str, Any]] = field(default_factory=list)
    """path, bytes, sha256, documents and tokens of every input file, in order."""
    format: int = FORMAT
    bin_blocks: list[str] = field(default_factory=list)
    """SHA-256 of every `BLOCK` of .bin, so that damage can be placed; empty in older data."""

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        write_json(path, asdict(self))

    def open_tokenizer(self, prefix: Path) -> tokenizers.Tokenizer:
        """The tokenizer that the dataset was prepared with.

        Raises:
            DataError: its copy is missing or is not the one that the manifest names.
        """
        if self.tokenizer == "byte":
            found = tokenizers.load("byte")
            source = "byte"
        else:
            copy = beside(prefix, ".tokenizer.json")
            found = tokenizers.load(str(copy))
            source = str(copy)
        if found.fingerprint != self.tokenizer_fingerprint:
            raise DataError(
                source,
                f"({found.fingerprint[:12]}) is not the tokenizer that {prefix} was prepared with "
                f"({self.tokenizer_fingerprint[:12]})",
                "restore the file or prepare the data again",
            )
        return found


def read_manifest(prefix: Path) -> Manifest | None:
    """The manifest of a prefix; None where there is none (data prepared by Megatron's tools).

    Raises:
        DataError: there is one, but it cannot be read or is of another format.
    """
    path = beside(prefix, ".json")
    again = "prepare the data again"
    try:
        found = path.stat()
        # A pipe or a device would never end.
        if not stat.S_ISREG(found.st_mode):
            raise DataError(str(path), "is not a plain file", again)
        if found.st_size > MAX_BYTES:
            raise DataError(str(path), f"has {found.st_size} bytes, more than {MAX_BYTES}", again)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(str(path), f"manifest cannot be read: {error}", again) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(str(path), f"is no manifest of format {FORMAT}", again)
    known = {item.name for item in fields(Manifest)}
    needed = {
        item.name
        for item in fields(Manifest)
        if item.default is MISSING and item.default_factory is MISSING
    }
    if odd := (set(content) - known) | (needed - set(content)):
        raise DataError(
            str(path), f"manifest fields missing or unknown: {', '.join(sorted(odd))[:200]}", again
        )
    manifest = Manifest(**content)
    if fault := _mistyped(manifest):
        raise DataError(str(path), f"manifest field {fault} has a value that it cannot have", again)
    return manifest


def _mistyped(manifest: Manifest) -> str | None:
    """The first field whose value is not of its type."""
    for name in _COUNTS:
        value = getattr(manifest, name)
        if type(value) is not int or not 0 <= value < 2**63:
            return name
    for name in _TEXTS:
        if not isinstance(getattr(manifest, name), str):
            return name
    eod = manifest.eod
    checks = {
        "eod": eod is None or (type(eod) is int and eod >= 0),
        "appended_eod": isinstance(manifest.appended_eod, bool),
        "unigram_entropy": type(manifest.unigram_entropy) in (int, float),
        "sources": isinstance(manifest.sources, list),
        "bin_blocks": isinstance(manifest.bin_blocks, list)
        and all(isinstance(digest, str) for digest in manifest.bin_blocks)
        and len(manifest.bin_blocks) in (0, -(-manifest.bin_bytes // BLOCK)),
    }
    return next((name for name, sound in checks.items() if not sound), None)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all (temporary name, then rename)."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
