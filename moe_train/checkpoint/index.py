"""``tensors.json``: which bytes of which file hold each part of each global tensor.

torch's own index is a pickle, which runs whatever code its author put there. This one is JSON,
and what it says is checked against the manifest before a byte is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from moe_train.checkpoint.manifest import INDEX, Manifest, read_json
from moe_train.errors import CheckpointError

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


def write_index(folder: Path, metadata: Metadata, results: Iterable[Iterable[WriteResult]]) -> None:
    """Write what torch's planner and writers say of the tensors, and flush it to the disk.

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
    with open(folder / INDEX, "w", encoding="utf-8") as out:
        json.dump({"format": FORMAT, "tensors": tensors}, out, sort_keys=True)
        out.flush()
        os.fsync(out.fileno())


def read_index(folder: Path, manifest: Manifest) -> Metadata:
    """The index of a checkpoint in torch's terms.

    Raises:
        CheckpointError: missing, too large, malformed, or names bytes that are not there.
    """
    path = folder / INDEX
    raw = read_json(path, MAX_BYTES)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or len(raw) != 2:
        raise CheckpointError(str(path), f"is not an index of format {FORMAT}")
    tensors = raw.get("tensors")
    if not isinstance(tensors, dict):
        raise CheckpointError(str(path), "tensors must be an object")
    sizes = {name: int(facts["size"]) for name, facts in manifest.files.items() if name != INDEX}
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, entry in tensors.items():
        try:
            described[key] = _tensor(key, entry, sizes, places)
        except (KeyError, TypeError, ValueError) as problem:
            raise CheckpointError(
                str(path), f"tensor {key!r} is malformed ({type(problem).__name__}: {problem})"
            ) from problem
    used = {place.relative_path for place in places.values()}
    if idle := sizes.keys() - used:
        raise CheckpointError(str(folder / min(idle)), "holds no tensor that the index names")
    return Metadata(state_dict_metadata=described, storage_data=places)


def _tensor(
    key: str,
    entry: Mapping[str, Any],
    sizes: Mapping[str, int],
    places: dict[MetadataIndex, _StorageInfo],
) -> TensorStorageMetadata:
    shape = _counts(entry["shape"])
    chunks = []
    for number, raw in enumerate(entry["chunks"]):
        offset, extent = _counts(raw["offset"]), _counts(raw["shape"])
        inside = zip(offset, extent, shape, strict=True)
        if any(begin + length > whole for begin, length, whole in inside):
            raise ValueError(f"chunk {number} lies outside")
        begin, length = _counts([raw["begin"], raw["length"]])
        if begin + length > sizes[raw["file"]]:
            raise ValueError(f"chunk {number} is beyond the end of {raw['file']}")
        chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(extent)))
        index = MetadataIndex(key, torch.Size(offset), number)
        if index in places:
            raise ValueError(f"chunk {number} is there twice")
        places[index] = _StorageInfo(raw["file"], begin, length)
    # What no chunk covers would be loaded as whatever the memory held.
    if sum(prod(chunk.sizes) for chunk in chunks) != prod(shape):
        raise ValueError("its chunks do not make up its shape")
    return TensorStorageMetadata(
        TensorProperties(dtype=_DTYPES[entry["dtype"]]), torch.Size(shape), chunks
    )


def _counts(values: Any) -> list[int]:
    if not isinstance(values, list) or any(
        type(value) is not int or not 0 <= value < 2**63 for value in values
    ):
        raise ValueError(f"{str(values)[:80]} are not counts")
    return values
