"""Reading and writing safetensors files, tensor by tensor, without torch.

A file is eight bytes of length, a JSON header, and the values. The header of a foreign file is
checked whole before a byte of a tensor is read: every range inside the file, none overlapping,
nothing left over (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_train.convert.tensors import WIDTHS, Array, Shape, raw
from moe_train.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Bytes of a header, as in the format's own library."""
_PIECE = 8 << 20
_DAMAGED = "fetch or export the folder again"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype by the format's name, and the bytes that hold it."""

    path: Path
    dtype: str
    shape: Shape
    begin: int
    """In the file."""
    end: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by name.

    Raises:
        CheckpointError: not a plain file, or its header is damaged or contradicts its size.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(str(path), "is not a plain file", _DAMAGED)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, status.st_size - 8):
                raise CheckpointError(
                    str(path), f"is truncated or no safetensors file (header of {length} bytes)",
                    _DAMAGED,
                )  # fmt: skip
            text = file.read(length)
    except OSError as problem:
        raise CheckpointError(str(path), f"cannot be read: {problem}", _DAMAGED) from problem
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, one, 8 + length) for name, one in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise CheckpointError(str(path), f"its header is malformed: {problem}", _DAMAGED) from None
    position = 8 + length
    for name, one in sorted(tensors.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if one.begin != position:
            raise CheckpointError(str(path), f"{name} does not follow the tensor before", _DAMAGED)
        position = one.end
    if position != status.st_size:
        raise CheckpointError(
            str(path), f"has {status.st_size} bytes, and its tensors end at {position}", _DAMAGED
        )
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} is there twice")
    return result


def _stored(path: Path, entry: Mapping[str, Any], base: int) -> Stored:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, begin, end)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise ValueError(f"{numbers} are not sizes")
    if dtype in WIDTHS and prod(shape) * WIDTHS[dtype] != end - begin:
        raise ValueError(f"{shape} of {dtype} are not {end - begin} bytes")
    return Stored(path, str(dtype), shape, base + begin, base + end)


def read_rows(stored: Stored, begin: int = 0, end: int | None = None) -> Array:
    """Values of a tensor, or of some of its first axis, as the integers that hold them.

    Raises:
        CheckpointError: the file ends before, or cannot be read.
    """
    dtype, shape = raw(stored.dtype), stored.shape
    row = prod(shape[1:]) * dtype.itemsize
    end = shape[0] if end is None else end
    values: Array = np.empty((end - begin, *shape[1:]), dtype)
    target = memoryview(values.reshape(-1)).cast("B") if values.size else memoryview(b"")
    try:
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.begin + begin * row)
            done = 0
            while done < len(target):
                count = file.readinto(target[done : done + _PIECE])
                if not count:
                    raise CheckpointError(str(stored.path), "ends inside a tensor", _DAMAGED)
                done += count
    except OSError as problem:
        raise CheckpointError(str(stored.path), f"cannot be read: {problem}") from problem
    return values


def hash_tensor(stored: Stored) -> str:
    """SHA-256 of a tensor's bytes as the file has them.

    Raises:
        CheckpointError: the file ends before, or cannot be read.
    """
    digest, left = hashlib.sha256(), stored.end - stored.begin
    piece = memoryview(bytearray(min(_PIECE, max(left, 1))))
    try:
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.begin)
            while left:
                count = file.readinto(piece[: min(len(piece), left)])
                if not count:
                    raise CheckpointError(str(stored.path), "ends inside a tensor", _DAMAGED)
                digest.update(piece[:count])
                left -= count
    except OSError as problem:
        raise CheckpointError(str(stored.path), f"cannot be read: {problem}") from problem
    return digest.hexdigest()


class SafetensorsWriter:
    """Writes one file, whose tensors are known beforehand, in their order, and hashes each.

    Args:
        tensors: dtype and shape by name, in the order in which they will be written.

    Raises:
        OSError: the disk refuses.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, Shape]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, (dtype, shape) in tensors.items():
            end = position + prod(shape) * WIDTHS[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._left = list(tensors.items())
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, dtype: str, values: Array) -> str:
        """Write the next tensor.

        Returns:
            SHA-256 of its bytes.
        """
        expected = self._left.pop(0)
        assert expected == (name, (dtype, values.shape)), (expected, name, dtype, values.shape)
        content = memoryview(np.ascontiguousarray(values).reshape(-1)).cast("B")
        digest = hashlib.sha256()
        for begin in range(0, len(content), _PIECE):
            piece = content[begin : begin + _PIECE]
            digest.update(piece)
            self._file.write(piece)
        return digest.hexdigest()

    def close(self, *, complete: bool = True) -> None:
        """Flush the file to the disk and close it."""
        assert not (complete and self._left), f"not written: {self._left[0][0]}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def layout_files(
    tensors: Iterable[tuple[str, str, Shape]], limit: int
) -> list[dict[str, tuple[str, Shape]]]:
    """Tensors dealt to files of at most ``limit`` bytes, in their order."""
    files: list[dict[str, tuple[str, Shape]]] = []
    free = 0
    for name, dtype, shape in tensors:
        size = prod(shape) * WIDTHS[dtype]
        if not files or size > free:
            files.append({})
            free = limit
        files[-1][name] = (dtype, shape)
        free -= size
    return files
