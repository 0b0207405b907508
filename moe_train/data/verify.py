"""Checks of an indexed dataset's files before anything is trained on them.

The .idx layout is that of Megatron's indexed dataset, version 1: magic (9 bytes), version
(u64), dtype code (u8), sequences (u64), document entries (u64), then per sequence a length
(i32) and a byte offset (i64), then the document entries (i64).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.manifest import BLOCK, Manifest, dataset_file, read_manifest
from moe_train.errors import DataError
from moe_train.files import file_digest

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
INTEGER_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
AGAIN = "copy the file again, or run moe-train data prepare"
SCAN = 1 << 24
"""Tokens looked at in one go."""


@dataclass(frozen=True)
class DatasetFiles:
    """Contents of a prefix's files, as their index describes them."""

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
        return dataset_file(self.prefix, ".bin")

    def chunks(self) -> Iterator[npt.NDArray[Any]]:
        """Token ids in order, in pieces of at most `SCAN`."""
        ids = np.memmap(self.bin_path, dtype=self.dtype, mode="r", shape=(self.tokens,))
        for start in range(0, self.tokens, SCAN):
            yield ids[start : start + SCAN]


def check_files(prefix: Path) -> DatasetFiles:
    """Check that the files of a prefix are there, whole and consistent.

    Raises:
        DataError: naming the file, and the offset from which bytes are missing.
    """
    for ending in (".idx", ".bin"):
        path = dataset_file(prefix, ending)
        if not path.is_file():
            raise DataError(
                str(path), "does not exist", "give the prefix that moe-train data prepare wrote"
            )
    manifest = read_manifest(prefix)
    idx, binary = dataset_file(prefix, ".idx"), dataset_file(prefix, ".bin")
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
    _check_places(idx, raw, lengths, int(entries), dtype.itemsize)
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens == 0:
        raise DataError(str(binary), "holds no token: empty corpus", "prepare other sources")
    if manifest is not None and tokens * dtype.itemsize != manifest.bin_bytes:
        # The tokens are as many as the manifest says: it is the index that does not fit.
        at = HEADER.size + 4 * (int(sequences) - 1)
        raise DataError(
            str(idx), f"sequences up to offset {at} make up {tokens} tokens, too many or few", AGAIN
        )
    _check_size(binary, tokens * dtype.itemsize, "index")
    return DatasetFiles(prefix, dtype, lengths, entries - 1, tokens, manifest)


def _check_places(
    idx: Path,
    raw: npt.NDArray[np.uint8],
    lengths: npt.NDArray[np.int32],
    entries: int,
    itemsize: int,
) -> None:
    """Refuse an index that leads a reader outside of the tokens, or to others than it says."""
    places = HEADER.size + 4 * lengths.size
    documents = places + 8 * lengths.size
    begins = raw[places:documents].view(np.int64)
    expected = 0
    for start in range(0, lengths.size, SCAN):
        sizes = lengths[start : start + SCAN].astype(np.int64) * itemsize
        ends = expected + np.cumsum(sizes)
        wrong = np.flatnonzero(begins[start : start + SCAN] != ends - sizes)
        if wrong.size:
            at = places + 8 * (start + int(wrong[0]))
            raise DataError(str(idx), f"wrong place of a sequence at offset {at}", AGAIN)
        expected = int(ends[-1])
    bounds = raw[documents : documents + 8 * entries].view(np.int64)
    falls = np.flatnonzero(np.diff(bounds) < 0)
    if falls.size:
        at = documents + 8 * (int(falls[0]) + 1)
        raise DataError(str(idx), f"documents out of order at offset {at}", AGAIN)
    if int(bounds[0]) != 0 or int(bounds[-1]) != lengths.size:
        at = documents + (8 * (entries - 1) if int(bounds[0]) == 0 else 0)
        raise DataError(str(idx), f"documents do not span the sequences (offset {at})", AGAIN)


def largest_id(files: DatasetFiles) -> int:
    """Largest id in the tokens, by reading them all; both files against the manifest's SHA-256.

    Raises:
        DataError: an id is negative, or a digest differs (file and offset).
    """
    largest = 0
    for index, chunk in enumerate(files.chunks()):
        low = int(chunk.min())
        if low < 0:
            at = (index * SCAN + int(np.argmin(chunk))) * files.dtype.itemsize
            raise DataError(str(files.bin_path), f"negative token id {low} at offset {at}", AGAIN)
        largest = max(largest, int(chunk.max()))
    if files.manifest is not None:
        # First what has one exact place, then what digests can only place in a block.
        owner = "the tokenizer's vocabulary"
        check_vocabulary(files, largest, files.manifest.vocab_size, owner)
        _check_digests(files, files.manifest)
    return largest


def _check_digests(files: DatasetFiles, manifest: Manifest) -> None:
    idx = dataset_file(files.prefix, ".idx")
    if file_digest(idx) != manifest.idx_sha256:
        raise DataError(str(idx), "does not match the SHA-256 of its manifest", AGAIN)
    whole, blocks = block_digests(files.bin_path)
    for number, (expected, actual) in enumerate(zip(manifest.bin_blocks, blocks, strict=False)):
        if expected != actual:
            begin, end = number * BLOCK, min((number + 1) * BLOCK, manifest.bin_bytes)
            raise DataError(
                str(files.bin_path),
                f"does not match the SHA-256 of its manifest between offsets {begin} and {end}",
                AGAIN,
            )
    if whole != manifest.bin_sha256:
        raise DataError(
            str(files.bin_path), "does not match the SHA-256 of its manifest (from offset 0)", AGAIN
        )


def block_digests(path: Path) -> tuple[str, list[str]]:
    """SHA-256 of a file, and of each `BLOCK` of it."""
    whole, blocks = hashlib.sha256(), []
    with path.open("rb") as stream:
        while piece := stream.read(BLOCK):
            whole.update(piece)
            blocks.append(hashlib.sha256(piece).hexdigest())
    return whole.hexdigest(), blocks


def check_vocabulary(files: DatasetFiles, largest: int, limit: int, owner: str) -> None:
    """Refuse tokens that a vocabulary of `limit` ids does not have.

    Args:
        files: the dataset.
        largest: its largest id.
        limit: ids below this are legal.
        owner: whose vocabulary it is, for the message.

    Raises:
        DataError: file, id and offset of the first such token.
    """
    if largest < limit:
        return
    for index, chunk in enumerate(files.chunks()):
        beyond = np.flatnonzero(chunk >= limit)
        if beyond.size:
            at = (index * SCAN + int(beyond[0])) * files.dtype.itemsize
            raise DataError(
                str(files.bin_path),
                f"token id {int(chunk[beyond[0]])} at offset {at} is beyond {owner} of {limit}",
                f"a vocabulary of at least {largest + 1}, or the tokenizer of this data",
            )
    raise DataError(
        str(files.bin_path), f"manifest names a token id {largest} that is not there", AGAIN
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
