"""``verify-hf``: a Hugging Face folder compared with its export record; no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moe_train.convert import record
from moe_train.convert.folder import INDEX, open_folder
from moe_train.convert.record import ExportRecord, TensorRecord
from moe_train.convert.safetensors_file import Stored, hash_tensor
from moe_train.errors import CheckpointError

_RESTORE = "export the checkpoint again, or fetch the folder again"


@dataclass(frozen=True)
class Verified:
    """What was compared."""

    record: ExportRecord
    tensors: int
    bytes: int


def verify_folder(path: Path) -> Verified:
    """Compare every file and every tensor of a folder with its record.

    Raises:
        CheckpointError: names the first file or tensor that is missing, left over or different.
        ConfigError: config.json no longer describes a model that is known here.
    """
    written = record.read_record(path)
    if record.weights_digest(written.tensors) != written.weights_sha256:
        raise CheckpointError(str(path / record.NAME), "contradicts itself", _RESTORE)
    for name, digest in sorted(written.files.items()):
        # Shards' headers are compared tensor by tensor.
        if not (path / name).is_file():
            raise CheckpointError(str(path / name), "is missing", _RESTORE)
        if record.file_digest(path / name) != digest:
            raise CheckpointError(str(path / name), "differs from what was exported", _RESTORE)
    for name in sorted({one.file for one in written.tensors.values()}):
        if not (path / name).is_file():
            raise CheckpointError(str(path / name), "is missing", _RESTORE)
    known = {*written.files, record.NAME, *(one.file for one in written.tensors.values())}
    for file in sorted(path.iterdir()):
        if file.name not in known and file.suffix in (".safetensors", ".json", ".py", ".bin"):
            raise CheckpointError(str(file), "was not exported", "remove it if it is yours")
    if INDEX not in written.files and (path / INDEX).exists():
        raise CheckpointError(str(path / INDEX), "was not exported", _RESTORE)
    folder = open_folder(path)
    _compare(folder.tensors, written.tensors)
    if folder.architecture.name != written.architecture:
        raise CheckpointError(
            str(path), f"is {folder.architecture.name}, and {written.architecture} was exported"
        )
    return Verified(
        written,
        len(folder.tensors),
        sum(one.end - one.begin for one in folder.tensors.values()),
    )


def _compare(tensors: Mapping[str, Stored], expected: Mapping[str, TensorRecord]) -> None:
    for name in sorted(tensors.keys() ^ expected.keys()):
        problem = "is missing" if name in expected else "was not exported"
        raise CheckpointError(name, problem, _RESTORE)
    for name, one in tensors.items():
        wanted = expected[name]
        for what, here, there in (
            ("in", one.path.name, wanted.file),
            ("of dtype", one.dtype, wanted.dtype),
            ("of shape", list(one.shape), wanted.shape),
        ):
            if here != there:
                raise CheckpointError(name, f"is {what} {here}, and was {what} {there}", _RESTORE)
    names = sorted(tensors, key=lambda name: (tensors[name].path, tensors[name].begin))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "hash") as pool:
        digests = pool.map(lambda name: hash_tensor(tensors[name]), names)
        different = [
            name
            for name, digest in zip(names, digests, strict=True)
            if digest != expected[name].sha256
        ]
    if different:
        more = f" ({len(different)} tensors: {', '.join(different[:4])})"
        raise CheckpointError(
            different[0], "does not match its SHA-256" + more * (len(different) > 1), _RESTORE
        )
