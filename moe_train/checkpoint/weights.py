"""Weights of a checkpoint in one process, without process groups or Megatron.

:class:`WeightsReader` reads parts of global tensors from a checkpoint of any layout;
:class:`WeightsWriter` writes a checkpoint that has weights alone. Items are read by
``torch.load(weights_only=True)``, which builds tensors only.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterable, Sequence
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

from moe_train.checkpoint import folders, manifest
from moe_train.checkpoint.digests import Block, HashingStream, block_size, blocks, file_entry
from moe_train.checkpoint.index import read_index, write_index
from moe_train.checkpoint.manifest import INDEX, Manifest, check_blocks, check_files
from moe_train.errors import CheckpointError

type Place = tuple[slice, ...]


class WeightsReader:
    """Weights of a committed checkpoint; what is read of its files is verified first.

    Args:
        folder: the checkpoint's.

    Raises:
        CheckpointError: the manifest or the index is damaged, or the bytes of a weight are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = manifest.read_manifest(folder)
        check_files(folder, self.manifest)
        index = [block for block in blocks(self.manifest.files) if block.file == INDEX]
        check_blocks(folder, index)
        self._metadata = read_index(folder, self.manifest)
        self._places: dict[MetadataIndex, _StorageInfo] = self._metadata.storage_data
        check_blocks(folder, list(self._blocks()), threads=min(8, os.cpu_count() or 1))

    def _blocks(self) -> Iterable[Block]:
        """Blocks with bytes of weights: an optimizer's state, several times as large, is not
        read.
        """
        ranges: dict[str, list[tuple[int, int]]] = {}
        for place, info in self._places.items():
            if place.fqn in self.keys():
                end = info.offset + info.length
                ranges.setdefault(info.relative_path, []).append((info.offset, end))
        for block in blocks(self.manifest.files):
            inside = ranges.get(block.file, ())
            if any(begin < block.end and block.begin < end for begin, end in inside):
                yield block

    def keys(self) -> set[str]:
        """Global keys of the weights and of the router's buffers."""
        return {
            key
            for key in self._metadata.state_dict_metadata
            if not key.startswith("optimizer.") and key != "rng"
        }

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return tuple(self._tensor(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a global tensor."""
        dtype = self._tensor(key).properties.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """A global tensor, or one layer's part of it, without the axis of layers.

        Raises:
            CheckpointError: it is not there, or an item is no tensor of its shape.
        """
        stored = self._tensor(key)
        whole = (slice(0, size) for size in stored.size)
        wanted = tuple(whole) if layer is None else (slice(layer, layer + 1), *tuple(whole)[1:])
        target: torch.Tensor | None = None
        for number, chunk in enumerate(stored.chunks):
            source, place = _overlap(chunk, wanted)
            if source is None:
                continue
            item = self._item(MetadataIndex(key, chunk.offsets, number), chunk, stored)
            part = item[source]
            shape = [one.stop - one.start for one in wanted]
            if list(part.shape) == shape:
                target = part
                break
            if target is None:
                target = torch.empty(shape, dtype=part.dtype)
            target[place] = part
        if target is None:
            raise CheckpointError(key, f"has no layer {layer} in {self.folder}")
        return target if layer is None else target[0]

    def _tensor(self, key: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(key, f"is not in {self.folder}")
        return stored

    def _item(
        self, index: MetadataIndex, chunk: ChunkStorageMetadata, stored: TensorStorageMetadata
    ) -> torch.Tensor:
        info = self._places[index]
        with open(self.folder / info.relative_path, "rb") as file:
            file.seek(info.offset)
            content = file.read(info.length)
        try:
            item = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as problem:  # whatever unpacking makes of damaged bytes
            raise CheckpointError(index.fqn, f"cannot be read: {problem}") from problem
        if not isinstance(item, torch.Tensor) or item.numel() != prod(chunk.sizes):
            raise CheckpointError(index.fqn, "has an item that is no tensor of its shape")
        if item.dtype != stored.properties.dtype:
            raise CheckpointError(index.fqn, f"has an item of {item.dtype}")
        return item.view(chunk.sizes)


def _overlap(chunk: ChunkStorageMetadata, wanted: Place) -> tuple[Place | None, Place]:
    """Where a chunk and what is wanted overlap, in the chunk and in what is wanted."""
    source, place = [], []
    for offset, size, part in zip(chunk.offsets, chunk.sizes, wanted, strict=True):
        begin, end = max(offset, part.start), min(offset + size, part.stop)
        if begin >= end:
            return None, ()
        source.append(slice(begin - offset, end - offset))
        place.append(slice(begin - part.start, end - part.start))
    return tuple(source), tuple(place)


class WeightsWriter:
    """Writes a checkpoint of weights alone, in parts, and commits it by rename.

    A fresh run can start from it; there is no optimizer state to resume with.

    Args:
        root: ``checkpoints/`` of the folder that will hold it.
        shapes: dtype and global shape by key.

    Raises:
        CheckpointError: the disk refuses, or is too full.
    """

    def __init__(
        self, root: Path, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], step: int = 0
    ) -> None:
        self._root, self._shapes, self._step = root, shapes, step
        size = sum(prod(shape) * dtype.itemsize for dtype, shape in shapes.values())
        try:
            self._staging = folders.staging_folder(root, step)
            folders.check_free_space(root, size)
            self._plain = open(self._staging / "__0_0.distcp", "wb")  # noqa: SIM115
        except OSError as problem:
            raise CheckpointError(str(root), f"cannot be written: {problem}") from problem
        self._stream = HashingStream(self._plain, block_size(size))
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in shapes}
        self._results: list[WriteResult] = []

    def write(self, key: str, offset: Sequence[int], values: torch.Tensor) -> None:
        """Write a part of a global tensor.

        Args:
            offset: of the part, for each axis of the global tensor; axes that ``values`` lack are
                the first ones, and have length 1.

        Raises:
            CheckpointError: the disk refuses.
        """
        dtype, shape = self._shapes[key]
        assert values.dtype == dtype, (key, values.dtype, dtype)
        sizes = torch.Size((1,) * (len(shape) - values.dim()) + tuple(values.shape))
        begin = self._stream.tell()
        try:
            # A storage of its own: torch.save writes the whole of what a view shares.
            whole = values.clone() if _shared(values) else values
            torch.save(whole.reshape(sizes), self._stream)  # type: ignore[arg-type]
        except OSError as problem:
            raise CheckpointError(str(self._root), f"cannot be written: {problem}") from problem
        place = torch.Size(offset)
        self._chunks[key].append(ChunkStorageMetadata(place, sizes))
        info = _StorageInfo("__0_0.distcp", begin, self._stream.tell() - begin)
        self._results.append(WriteResult(MetadataIndex(key, place), info.length, info))

    def commit(self, **fields: Any) -> Path:
        """Write index and manifest, and give the checkpoint its name.

        Args:
            fields: the manifest's, but for those of the optimizer, the step and the files.

        Raises:
            CheckpointError: the disk refuses, or a tensor is not whole.
        """
        described: dict[str, Any] = {}
        for key, (dtype, shape) in self._shapes.items():
            written = sum(prod(chunk.sizes) for chunk in self._chunks[key])
            assert written == prod(shape), f"{key}: {written} of {prod(shape)} elements"
            described[key] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(shape), self._chunks[key]
            )
        try:
            self._plain.flush()
            os.fsync(self._plain.fileno())
            self._plain.close()
            write_index(self._staging, Metadata(state_dict_metadata=described), [self._results])
            files = {
                "__0_0.distcp": self._stream.entry(),
                INDEX: file_entry(self._staging / INDEX),
            }
            Manifest(
                **fields,
                step=self._step,
                optimizer_step=0,
                optimizer_states=[],
                rng_sizes=[],
                files=files,
            ).write(self._staging)
            return folders.commit(self._staging)
        except OSError as problem:
            raise CheckpointError(str(self._root), f"cannot be written: {problem}") from problem

    def discard(self) -> None:
        """Remove what was written; nothing was committed."""
        self._plain.close()
        shutil.rmtree(self._staging, ignore_errors=True)


def _shared(values: torch.Tensor) -> bool:
    return values.untyped_storage().nbytes() != values.numel() * values.itemsize
