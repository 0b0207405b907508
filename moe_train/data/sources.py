"""Raw input files: which ones a request names, and their raw documents in order.

A raw document is still unchecked (bytes of a line, bytes of a file, or a parquet value);
`encode` checks and tokenizes it, so that the costly part can run in parallel.
"""

from __future__ import annotations

import gzip
import importlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_train.errors import DataError

CHUNK = 1 << 20
KINDS = {
    **dict.fromkeys((".txt", ".md", ".py", ".rst"), "text"),
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst"), "jsonl"),
    ".parquet": "parquet",
}
"""How a file is read, by the ending of its name."""
ENDINGS = ", ".join(KINDS)


class Raw(NamedTuple):
    """One raw document and its position (line or row, from 1)."""

    position: int
    content: Any


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    kind: str
    """text (the file is one document) | jsonl | parquet."""


def expand(paths: Iterable[Path]) -> list[Source]:
    """Files named by the request, folders walked in sorted order.

    Raises:
        DataError: a path is missing, has an unknown ending, or no file is left.
    """
    sources: list[Source] = []
    for path in paths:
        if path.is_dir():
            files = (p for p in path.rglob("*") if p.is_file())
            inside = sorted((p for p in files if _kind(p)), key=lambda p: p.as_posix())
            if not inside:
                raise DataError(str(path), "holds no file to read", f"endings read: {ENDINGS}")
            sources += [Source(p, str(_kind(p))) for p in inside]
        elif not path.exists():
            raise DataError(str(path), "does not exist", "give an existing file or folder")
        elif kind := _kind(path):
            sources.append(Source(path, kind))
        else:
            raise DataError(str(path), "has an unknown ending", f"endings read: {ENDINGS}")
    if not sources:
        raise DataError("sources", "none given", "name at least one file or folder")
    seen: set[Path] = set()
    for source in sources:
        real = source.path.resolve()
        if real in seen:
            raise DataError(str(source.path), "is named twice", "name every file once")
        seen.add(real)
    return sources


def read(source: Source, text_key: str = "text") -> Iterator[Raw]:
    """Raw documents of a source, in order.

    Args:
        source: the file.
        text_key: column of a parquet file.

    Raises:
        DataError: the file cannot be read, or ends in the middle of its compression.
    """
    try:
        if source.kind == "text":
            yield Raw(1, source.path.read_bytes())
        elif source.kind == "jsonl":
            for number, line in enumerate(_lines(_chunks(source.path)), 1):
                if line.strip():
                    yield Raw(number, line)
        else:
            yield from _parquet(source.path, text_key)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            str(source.path), f"cannot be read: {error}", "repair the file or leave it out"
        ) from error


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for ending, kind in KINDS.items() if name.endswith(ending)), None)


def _chunks(path: Path) -> Iterator[bytes]:
    """Decompressed bytes of a file."""
    name = path.name.lower()
    if name.endswith(".zst"):
        yield from _zstandard(path)
        return
    with gzip.open(path, "rb") if name.endswith(".gz") else path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _zstandard(path: Path) -> Iterator[bytes]:
    """Decompressed bytes of all frames; unlike the stream reader, it sees a cut file."""
    zstandard = _library("zstandard", path)
    frame = None
    with path.open("rb") as stream:
        while data := stream.read(CHUNK):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from error
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("zstandard stream ends before its end-of-frame marker")


def _library(name: str, path: Path) -> Any:
    """A module that only this kind of file needs.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        package = name.partition(".")[0]
        raise DataError(
            str(path),
            f"needs {package} to be read, which does not import: {missing}",
            f"install {package}, or convert the file to .jsonl or .jsonl.gz elsewhere",
        ) from missing


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their line feed."""
    rest: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    last = b"".join(rest)
    if last:
        yield last


def _parquet(path: Path, column: str) -> Iterator[Raw]:
    pyarrow = _library("pyarrow", path)
    _library("pyarrow.parquet", path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(
                    str(path),
                    f"has no column {column!r}",
                    f"columns it has: {', '.join(names) or 'none'}; choose with --text-key",
                )
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield Raw(row, value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            str(path), f"is no readable parquet file: {error}", "repair the file or leave it out"
        ) from error
