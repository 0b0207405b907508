"""What a prepared dataset says about itself: ``PREFIX.json`` beside .bin and .idx."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moe_train.data import tokenizer as tokenizers
from moe_train.errors import DataError

FORMAT = 1


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
    if not path.exists():
        return None
    again = "prepare the data again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"manifest cannot be read: {error}", again) from error
    known = {item.name for item in fields(Manifest)}
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(str(path), f"is no manifest of format {FORMAT}", again)
    if set(content) != known:
        odd = ", ".join(sorted(set(content) ^ known))
        raise DataError(str(path), f"manifest fields missing or unknown: {odd}", again)
    return Manifest(**content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all (temporary name, then rename)."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
