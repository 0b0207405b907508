"""Block-wise SHA-256 of files, so that the ranks of any world can share the work of verifying.

A digest of a whole file can only be made by one reader from the first byte to the last, and a
checkpoint has as many files as the world that wrote it had writing ranks. Blocks can be divided
among any number of readers, and a damaged one says where the damage is.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NotRequired, TypedDict

from pydantic import ConfigDict, Field, with_config

from moe_train.files import Count

type Sha256 = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]

BLOCKS = 256
"""Blocks of a file at most: R ranks that verify W files then differ by one block in R / W of them,
less than a tenth of a share up to 12 times as many ranks as files."""
DIGESTS = 1 << 16
"""Digests of a checkpoint at most, so that the manifest of a large world stays a few megabytes."""
SMALLEST = 4096
_PIECE = 1 << 20
"""Bytes that are read at a time."""


@with_config(ConfigDict(strict=True, extra="forbid"))
class FileEntry(TypedDict):
    """A file's entry in a manifest."""

    size: Count
    sha256: Sha256 | list[Sha256]
    """Of each block, or (format 2) of the whole file."""
    block: NotRequired[Annotated[int, Field(gt=0)]]
    """Bytes of a block; absent in format 2."""


@dataclass(frozen=True)
class Block:
    """Some bytes of a file, and the SHA-256 that they should have."""

    file: str
    begin: int
    end: int
    sha256: str

    @property
    def bytes(self) -> int:
        """Length."""
        return self.end - self.begin


def block_size(size: int, files: int = 1) -> int:
    """Bytes of a block of a file of ``size`` bytes: a power of two.

    Args:
        files: of the whole checkpoint.
    """
    blocks = max(16, min(BLOCKS, DIGESTS // max(files, 1)))
    return max(SMALLEST, 1 << max(-(-size // blocks) - 1, 0).bit_length())


class HashingStream:
    """Writes to ``stream`` and hashes what is written; never seeks.

    The bytes are hashed before the file system stores them: a file that it damages will not match.
    """

    def __init__(self, stream: BinaryIO, block: int) -> None:
        self._stream, self._block = stream, block
        self._size, self._digests = 0, [hashlib.sha256()]

    def write(self, content: Any) -> int:
        """Write all of ``content`` (bytes or a buffer)."""
        view = memoryview(content).cast("B")
        written = 0
        # A raw file may take less than it is given.
        while written < len(view):
            written += self._stream.write(view[written:])
        begin = 0
        while begin < len(view):
            left = self._block - self._size % self._block
            if self._size and left == self._block:
                self._digests.append(hashlib.sha256())
            part = view[begin : begin + left]
            self._digests[-1].update(part)
            self._size += len(part)
            begin += len(part)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Flush the stream's buffer."""
        self._stream.flush()

    def entry(self) -> FileEntry:
        """The file's entry in a manifest."""
        digests = [digest.hexdigest() for digest in self._digests] if self._size else []
        return {"size": self._size, "block": self._block, "sha256": digests}


def file_entry(path: Path) -> FileEntry:
    """Entry of a file that is there already in a manifest."""
    size = path.stat().st_size
    block = block_size(size)
    with open(path, "rb") as stream:
        digests = [
            hash_range(stream, begin, min(begin + block, size)) for begin in range(0, size, block)
        ]
    return {"size": size, "block": block, "sha256": digests}


def hash_range(stream: BinaryIO, begin: int, end: int) -> str:
    """SHA-256 of bytes ``begin`` to ``end`` of a file; of fewer where it ends before.

    Raises:
        OSError: the disk refuses.
    """
    digest = hashlib.sha256()
    piece = memoryview(bytearray(min(_PIECE, max(end - begin, 1))))
    stream.seek(begin)
    while begin < end:
        read = stream.readinto(piece[: min(len(piece), end - begin)])  # type: ignore[attr-defined]
        if not read:
            break
        digest.update(piece[:read])
        begin += read
    return digest.hexdigest()


def blocks(files: Mapping[str, FileEntry]) -> list[Block]:
    """The blocks of a manifest's ``files``, in the order of names and offsets.

    Manifests of format 2 have one digest a file, which is one block then.
    """
    result = []
    for name, entry in sorted(files.items()):
        size, digests = entry["size"], entry["sha256"]
        if isinstance(digests, str):
            result.append(Block(name, 0, size, digests))
            continue
        for number, digest in enumerate(digests):
            step = entry["block"]
            begin = number * step
            result.append(Block(name, begin, min(begin + step, size), digest))
    return result


def rank_share(whole: Iterable[Block], rank: int, world: int) -> list[Block]:
    """The blocks that ``rank`` of ``world`` hashes; every rank computes the same shares.

    The largest block left goes to the rank with the fewest bytes so far (Graham's longest
    processing time rule), so that no rank has more than an even share and one block.
    """
    loads = [(0, number) for number in range(world)]
    own = []
    for block in sorted(whole, key=lambda block: -block.bytes):
        load, number = heapq.heappop(loads)
        if number == rank:
            own.append(block)
        heapq.heappush(loads, (load + block.bytes, number))
    return sorted(own, key=lambda block: (block.file, block.begin))
