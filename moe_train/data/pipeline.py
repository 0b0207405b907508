"""Encodes batches in parallel, with results in the order of the batches."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass

from moe_train.data.encode import Batch, Encoded, Encoder, Encoding
from moe_train.data.sources import Raw, Source, read
from moe_train.errors import DataError

BATCH_BYTES = 1 << 20
BATCH_ITEMS = 1024

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
    stream = encode_here(sources, encoding) if workers <= 1 else _pool(sources, encoding, workers)
    with closing(stream):  # or a caught fault would keep the workers alive
        for source, result in stream:
            if isinstance(result, Encoded) and result.fault:
                raise DataError(*result.fault)
            yield source, result


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
            "run again with fewer workers; finished files are kept",
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
