"""Encodes raw documents to token ids, in worker processes, with results in the sources' order."""

from __future__ import annotations

import json
import multiprocessing
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_train.data import tokenizer as tokenizers
from moe_train.data.sources import Raw, Source, read
from moe_train.errors import DataError

Tokens = npt.NDArray[np.int32]
BATCH_BYTES = 1 << 20
BATCH_ITEMS = 1024


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
        """Check and tokenize.

        Raises:
            DataError: naming file and line of the first bad document.
        """
        texts = [text_of(batch.path, batch.kind, raw, self.encoding) for raw in batch.items]
        documents = self.tokenizer.encode_batch([text for text in texts if text])
        if self.encoding.append_eod:
            assert self.tokenizer.eod is not None
            for ids in documents:
                ids.append(self.tokenizer.eod)
        parts = [np.asarray(ids, np.int32) for ids in documents if ids]
        tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
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


_encoder: Encoder | None = None
"""The encoder of this worker process, opened once by `_open`."""


@dataclass(frozen=True)
class End:
    """All of a source has been read."""


Item = tuple[Source, Encoded | End]
Items = Generator[Item, None, None]


def encode_all(sources: list[Source], encoding: Encoding, workers: int) -> Items:
    """Encoded batches of all sources in order, each source closed by `End`.

    The order, and so the result, does not depend on the number of workers.

    Raises:
        DataError: a bad document (file and line), or a worker process that died.
    """
    return encode_here(sources, encoding) if workers <= 1 else _pool(sources, encoding, workers)


def encode_here(sources: list[Source], encoding: Encoding) -> Items:
    """Encode in this process."""
    encoder = Encoder(encoding)
    for source, batch in _batches(sources, encoding):
        yield source, batch if isinstance(batch, End) else encoder(batch)


def _pool(sources: list[Source], encoding: Encoding, workers: int) -> Items:
    """Encode in worker processes, a bounded number of batches ahead."""
    waiting: deque[tuple[Source, Future[Encoded] | End]] = deque()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_open, initargs=(encoding,))
    try:
        for source, batch in _batches(sources, encoding):
            waiting.append(
                (source, batch if isinstance(batch, End) else pool.submit(_encode, batch))
            )
            if len(waiting) > 3 * workers:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    except BrokenProcessPool as error:
        raise DataError(
            "--workers",
            f"one of {workers} worker processes died, perhaps for lack of memory",
            "run again with fewer workers; finished files are reused",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(source: Source, item: Future[Encoded] | End) -> Item:
    return source, item if isinstance(item, End) else item.result()


def _batches(sources: list[Source], encoding: Encoding) -> Iterator[tuple[Source, Batch | End]]:
    for source in sources:
        items: list[Raw] = []
        size = 0
        for raw in read(source, encoding.text_key):
            items.append(raw)
            size += len(raw.content) if isinstance(raw.content, str | bytes) else 1
            if size >= BATCH_BYTES or len(items) >= BATCH_ITEMS:
                yield source, Batch(source.path, source.kind, items)
                items, size = [], 0
        if items:
            yield source, Batch(source.path, source.kind, items)
        yield source, End()


def _open(encoding: Encoding) -> None:
    global _encoder
    _encoder = Encoder(encoding)


def _encode(batch: Batch) -> Encoded:
    assert _encoder is not None, "the pool's initializer opens it"
    return _encoder(batch)
