"""``tensors.json``: which bytes of which file hold each shard of each global tensor.

torch's own index is a pickle, which runs whatever code its author put there. This one is JSON,
and what it says is checked against the manifest before a byte is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from moe_train.checkpoint.manifest import INDEX, Manifest
from moe_train.errors import CheckpointError
from moe_train.files import Count, read_validated, write_atomically

FORMAT = 1
MAX_BYTES = 2**30
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(config=ConfigDict(strict=True, extra="forbid"))
class _Shard:
    """A part of a global tensor, and the bytes of a file that hold it."""

    offset: list[Count]
    """Global offset, a number for each axis."""
    shape: list[Count]
    file: str
    begin: Count
    length: Count


@dataclass(config=ConfigDict(strict=True, extra="forbid"))
class _Tensor:
    """A global tensor; ``dtype`` as in torch, without the prefix."""

    dtype: str
    shape: list[Count]
    chunks: list[_Shard]


@dataclass(config=ConfigDict(strict=True, extra="forbid"))
class _Index:
    """Contents of ``tensors.json``: global tensors by key."""

    format: Literal[1]
    tensors: dict[str, _Tensor]


def write_index(folder: Path, metadata: Metadata, results: Iterable[Iterable[WriteResult]]) -> None:
    """Write the metadata of torch's planner and writers as JSON, and flush it to the disk.

    Raises:
        OSError: the disk refuses.
    """
    places = {result.index: result.storage_data for part in results for result in part}
    tensors = {}
    for key, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata), f"{key} is no tensor"
        chunks = []
        for chunk in tensor.chunks:
            place = places[MetadataIndex(key, chunk.offsets)]
            chunks.append(
                {
                    "offset": list(chunk.offsets),
                    "shape": list(chunk.sizes),
                    "file": place.relative_path,
                    "begin": place.offset,
                    "length": place.length,
                }
            )
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        assert dtype in _DTYPES, f"{key} has dtype {dtype}"
        tensors[key] = {"dtype": dtype, "shape": list(tensor.size), "chunks": chunks}
    index = {"format": FORMAT, "tensors": tensors}
    write_atomically(folder / INDEX, json.dumps(index, sort_keys=True))


def read_index(folder: Path, manifest: Manifest) -> Metadata:
    """The index of a checkpoint as the metadata of ``torch.distributed.checkpoint``.

    Raises:
        CheckpointError: missing, too large, malformed, or names bytes that are not there.
    """
    path = folder / INDEX
    index = read_validated(
        path,
        _Index,
        limit=MAX_BYTES,
        what=f"an index of format {FORMAT}",
        error=CheckpointError,
        fix="the folder is not a complete checkpoint",
    )
    sizes = {name: entry["size"] for name, entry in manifest.files.items() if name != INDEX}
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, tensor in index.tensors.items():
        try:
            described[key] = _tensor_metadata(key, tensor, sizes, places)
        except (KeyError, ValueError) as problem:
            raise CheckpointError(
                str(path), f"tensor {key!r} is malformed ({type(problem).__name__}: {problem})"
            ) from problem
    used = {place.relative_path for place in places.values()}
    if unused := sizes.keys() - used:
        raise CheckpointError(str(folder / min(unused)), "holds no tensor that the index names")
    return Metadata(state_dict_metadata=described, storage_data=places)


def _tensor_metadata(
    key: str,
    tensor: _Tensor,
    sizes: Mapping[str, int],
    places: dict[MetadataIndex, _StorageInfo],
) -> TensorStorageMetadata:
    """Metadata of one global tensor; adds where each of its shards lies to ``places``."""
    shards = []
    for number, shard in enumerate(tensor.chunks):
        inside = zip(shard.offset, shard.shape, tensor.shape, strict=True)
        if any(begin + length > whole for begin, length, whole in inside):
            raise ValueError(f"chunk {number} lies outside")
        if shard.begin + shard.length > sizes[shard.file]:
            raise ValueError(f"chunk {number} is beyond the end of {shard.file}")
        offset = torch.Size(shard.offset)
        shards.append(ChunkStorageMetadata(offset, torch.Size(shard.shape)))
        index = MetadataIndex(key, offset, number)
        if index in places:
            raise ValueError(f"chunk {number} is there twice")
        places[index] = _StorageInfo(shard.file, shard.begin, shard.length)
    # What no chunk covers would be loaded as whatever the memory held.
    if sum(prod(shard.sizes) for shard in shards) != prod(tensor.shape):
        raise ValueError("its chunks do not make up its shape")
    return TensorStorageMetadata(
        TensorProperties(dtype=_DTYPES[tensor.dtype]), torch.Size(tensor.shape), shards
    )
