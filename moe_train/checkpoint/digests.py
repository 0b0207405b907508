"""SHA-256 of files in blocks, so that the ranks of any world can share the work of verifying.

A digest of a whole file can only be made by one reader from the first byte to the last, and a
checkpoint has as many files as the world that wrote it had writing ranks. Blocks can be dealt out
to any number of readers, and a damaged one says where the damage is.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

BLOCKS = 256
"""Blocks of a file at most: R ranks that verify W files then differ by one block in R / W of them,
less than a tenth of a share up to 12 times as many ranks as files."""
DIGESTS = 1 << 16
"""Digests of a checkpoint at most, so that the manifest of a large world stays a few megabytes."""
SMALLEST = 4096
_PIECE = 1 << 20
"""Bytes that are read at a time."""


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
    """Passes writes on to ``stream`` and takes the digests of what passes; never seeks.

    What is hashed is what the file system was given: a file that it keeps wrongly will not match.
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
            room = self._block - self._size % self._block
            if self._size and room == self._block:
                self._digests.append(hashlib.sha256())
            part = view[begin : begin + room]
            self._digests[-1].update(part)
            self._size += len(part)
            begin += len(part)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Hand on what the stream holds back."""
        self._stream.flush()

    def facts(self) -> dict[str, Any]:
        """The file's entry in a manifest: size, bytes of a block, SHA-256 of each block."""
        digests = [digest.hexdigest() for digest in self._digests] if self._size else []
        return {"size": self._size, "block": self._block, "sha256": digests}


def file_facts(path: Path) -> dict[str, Any]:
    """Entry of a file in a manifest: size, bytes of a block, SHA-256 of each block."""
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


def blocks(files: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """What there is to hash of a manifest's ``files``, in the order of names and places.

    Manifests of format 2 have one digest a file, which is one block then.
    """
    found = []
    for name, facts in sorted(files.items()):
        size, digests = facts["size"], facts["sha256"]
        if isinstance(digests, str):
            found.append(Block(name, 0, size, digests))
            continue
        step = facts["block"]
        for number, digest in enumerate(digests):
            begin = number * step
            found.append(Block(name, begin, min(begin + step, size), digest))
    return found


def share(whole: Iterable[Block], rank: int, world: int) -> list[Block]:
    """What ``rank`` of ``world`` hashes: the largest block left goes to who has least so far
    (Graham's longest processing time rule), so that no rank has more than an even share and one
    block.

    Every rank finds the same shares by itself.
    """
    loads = [(0, number) for number in range(world)]
    own = []
    for block in sorted(whole, key=lambda block: -block.bytes):
        load, number = heapq.heappop(loads)
        if number == rank:
            own.append(block)
        heapq.heappush(loads, (load + block.bytes, number))
    return sorted(own, key=lambda block: (block.file, block.begin))
