"""Raw documents to checked text to token ids; the part that runs in worker processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_train.data import tokenizer as tokenizers
from moe_train.data.sources import Raw
from moe_train.errors import DataError

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Encoding:
    """Everything that decides which ids a document becomes."""

    tokenizer: str
    """Specification that `tokenizer.load` takes."""
    eod_name: str | None = None
    append_eod: bool = True
    text_key: str = "text"


@dataclass(frozen=True)
class Batch:
    """Raw documents of one file."""

    path: Path
    kind: str
    items: Sequence[Raw]


@dataclass(frozen=True)
class Encoded:
    """Ids of a batch: the documents' ids one after the other, and their lengths."""

    tokens: Tokens
    lengths: Tokens
    skipped: int = 0
    """Documents without text."""
    fault: tuple[str, str, str] | None = None
    """Field, problem and fix of the first bad document; the rest is then empty."""


class Encoder:
    """Encodes batches with one open tokenizer.

    Raises:
        DataError: the tokenizer cannot be opened, or has no token to end a document.
    """

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self.tokenizer = tokenizers.load(encoding.tokenizer, encoding.eod_name)
        if encoding.append_eod and self.tokenizer.eod is None:
            raise DataError(
                "tokenizer",
                f"{encoding.tokenizer} has no known end-of-document token",
                "name one with --eod TOKEN, or give --no-append-eod",
            )

    def __call__(self, batch: Batch) -> Encoded:
        """Check and tokenize; a fault is returned, since exceptions of our family do not
        survive the way between processes with their three parts."""
        empty = np.zeros(0, np.int32)
        try:
            texts = [text_of(batch.path, batch.kind, raw, self.encoding) for raw in batch.items]
        except DataError as error:
            return Encoded(empty, empty, fault=(error.field, error.problem, error.fix))
        kept = [text for text in texts if text]
        documents = self.tokenizer.encode_batch(kept)
        if self.encoding.append_eod:
            assert self.tokenizer.eod is not None
            for ids in documents:
                ids.append(self.tokenizer.eod)
        parts = [np.asarray(ids, np.int32) for ids in documents if ids]
        tokens = np.concatenate(parts) if parts else empty
        lengths = np.asarray([part.size for part in parts], np.int32)
        return Encoded(tokens, lengths, skipped=len(texts) - len(parts))


def text_of(path: Path, kind: str, raw: Raw, encoding: Encoding) -> str:
    """Checked text of a raw document.

    Raises:
        DataError: naming file and line (row for parquet) of what is wrong.
    """
    if kind == "text":
        return _decode(path, raw.content, 1, "file")
    place = f"{path}:{raw.position}" if kind == "jsonl" else f"{path} row {raw.position}"
    if kind == "jsonl":
        line = _decode(path, raw.content, raw.position, "line")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(place, f"invalid JSON: {error}", "repair or drop the line") from error
        if not isinstance(record, dict):
            raise DataError(
                place, f"is a JSON {type(record).__name__}, not an object", "one object a line"
            )
        if encoding.text_key not in record:
            keys = ", ".join(map(str, record)) or "none"
            raise DataError(
                place,
                f"has no key {encoding.text_key!r}",
                f"keys it has: {keys}; choose with --text-key",
            )
        value = record[encoding.text_key]
    else:
        value = raw.content
    if not isinstance(value, str):
        raise DataError(
            place,
            f"{encoding.text_key!r} is {type(value).__name__}, not a string",
            "repair or drop it",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            place, f"{encoding.text_key!r} is no valid Unicode: {error.reason}", "repair or drop it"
        ) from error
    return value


def _decode(path: Path, content: bytes, first_line: int, unit: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        bad = content[error.start]
        raise DataError(
            f"{path}:{line}",
            f"invalid UTF-8 byte 0x{bad:02x} at offset {error.start} of the {unit}",
            "convert the file to UTF-8 or leave it out",
        ) from error
