"""Checks of an indexed dataset's files before anything is trained on them.

The .idx layout is that of Megatron's indexed dataset, version 1: magic (9 bytes), version
(u64), dtype code (u8), sequences (u64), document entries (u64), then per sequence a length
(i32) and a byte offset (i64), then the document entries (i64).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.manifest import Manifest, beside, read_manifest
from moe_train.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
INTEGER_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
AGAIN = "copy the file again, or run moe-train data prepare"
SCAN = 1 << 24
"""Tokens looked at in one go."""


@dataclass(frozen=True)
class Facts:
    """What the files of a prefix hold."""

    prefix: Path
    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    """Tokens of each sequence, shape [sequences]."""
    documents: int
    tokens: int
    manifest: Manifest | None

    @property
    def bin_path(self) -> Path:
        """File of the tokens."""
        return beside(self.prefix, ".bin")

    def chunks(self) -> Iterator[npt.NDArray[Any]]:
        """Token ids in order, in pieces of at most `SCAN`."""
        ids = np.memmap(self.bin_path, dtype=self.dtype, mode="r", shape=(self.tokens,))
        for start in range(0, self.tokens, SCAN):
            yield ids[start : start + SCAN]


def check_files(prefix: Path) -> Facts:
    """Check that the files of a prefix are there, whole and consistent.

    Raises:
        DataError: naming the file, and the offset from which bytes are missing.
    """
    for ending in (".idx", ".bin"):
        path = beside(prefix, ending)
        if not path.is_file():
            raise DataError(
                str(path), "does not exist", "give the prefix that moe-train data prepare wrote"
            )
    manifest = read_manifest(prefix)
    idx, binary = beside(prefix, ".idx"), beside(prefix, ".bin")
    if manifest is not None:
        _check_size(idx, manifest.idx_bytes, "manifest")
        _check_size(binary, manifest.bin_bytes, "manifest")
    size = idx.stat().st_size
    with idx.open("rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        raise DataError(str(idx), f"truncated at offset {size} in its header", AGAIN)
    magic, version, code, sequences, entries = HEADER.unpack(head)
    if magic != MAGIC or version != 1:
        raise DataError(str(idx), "is no Megatron index of version 1 (offset 0)", AGAIN)
    if code not in INTEGER_CODES:
        raise DataError(str(idx), f"unknown or non-integer dtype code {code} (offset 17)", AGAIN)
    body = HEADER.size + 12 * sequences + 8 * entries
    if size not in (body, body + sequences):  # the second form has a mode byte per sequence
        state = "truncated" if size < body else "has bytes too many"
        raise DataError(
            str(idx), f"{state} at offset {min(size, body)}: {size} bytes, expected {body}", AGAIN
        )
    if sequences == 0 or entries < 2:
        raise DataError(str(idx), "holds no document: empty corpus", "prepare other sources")
    dtype = np.dtype(INTEGER_CODES[code])
    raw = np.memmap(idx, dtype=np.uint8, mode="r")
    lengths = raw[HEADER.size : HEADER.size + 4 * sequences].view(np.int32)
    if int(lengths.min()) < 0:
        at = HEADER.size + 4 * int(np.argmin(lengths))
        raise DataError(str(idx), f"negative sequence length at offset {at}", AGAIN)
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens == 0:
        raise DataError(str(binary), "holds no token: empty corpus", "prepare other sources")
    _check_size(binary, tokens * dtype.itemsize, "index")
    return Facts(prefix, dtype, lengths, entries - 1, tokens, manifest)


def largest_id(facts: Facts) -> int:
    """Largest id in the tokens, by reading them all.

    Raises:
        DataError: an id is negative (file and offset).
    """
    largest = 0
    for index, chunk in enumerate(facts.chunks()):
        low = int(chunk.min())
        if low < 0:
            at = (index * SCAN + int(np.argmin(chunk))) * facts.dtype.itemsize
            raise DataError(str(facts.bin_path), f"negative token id {low} at offset {at}", AGAIN)
        largest = max(largest, int(chunk.max()))
    return largest


def check_vocabulary(facts: Facts, largest: int, limit: int, owner: str) -> None:
    """Refuse tokens that a vocabulary of `limit` ids does not have.

    Args:
        facts: the dataset.
        largest: its largest id.
        limit: ids below this are legal.
        owner: whose vocabulary it is, for the message.

    Raises:
        DataError: file, id and offset of the first such token.
    """
    if largest < limit:
        return
    for index, chunk in enumerate(facts.chunks()):
        beyond = np.flatnonzero(chunk >= limit)
        if beyond.size:
            at = (index * SCAN + int(beyond[0])) * facts.dtype.itemsize
            raise DataError(
                str(facts.bin_path),
                f"token id {int(chunk[beyond[0]])} at offset {at} is beyond {owner} of {limit}",
                f"a vocabulary of at least {largest + 1}, or the tokenizer of this data",
            )
    raise DataError(
        str(facts.bin_path), f"manifest names a token id {largest} that is not there", AGAIN
    )


def _check_size(path: Path, expected: int, witness: str) -> None:
    size = path.stat().st_size
    if size < expected:
        raise DataError(
            str(path), f"truncated at offset {size}: the {witness} says {expected} bytes", AGAIN
        )
    if size > expected:
        raise DataError(
            str(path), f"{size - expected} bytes more than its {witness} says ({expected})", AGAIN
        )
