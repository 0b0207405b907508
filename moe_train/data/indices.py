"""Megatron's cached sample indices: no pickle among them, and unchanged since they were built.

Megatron reads them with ``numpy.load(allow_pickle=True)``. They can be built again at any time,
so damage costs seconds; a pickle in their place is no accident and is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from moe_train.data.manifest import write_json
from moe_train.errors import DataError

LOGGER = logging.getLogger(__name__)
RECORD = "sha256.json"


def refuse_pickles(folder: Path) -> None:
    """Refuse a cache folder with a file that numpy would have to unpickle, or a link.

    Raises:
        DataError: names the file.
    """
    for path in sorted(folder.glob("*")):
        problem = ""
        if path.is_symlink() or not path.is_file():
            problem = "is not a plain file"
        elif path.suffix == ".npy" and _is_pickle(path):
            problem = "holds a pickle, which could run code"
        if problem:
            raise DataError(str(path), problem, f"remove {folder}: it is built again by itself")


def unchanged(folder: Path) -> bool:
    """Whether the folder holds what :func:`record` saw, and no array besides."""
    try:
        told = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return isinstance(told, dict) and told == _digests(folder)
    except FileNotFoundError:
        return not any(folder.glob("*.npy"))
    except (OSError, ValueError, RecursionError) as error:
        LOGGER.warning("%s cannot be read: %s", folder / RECORD, error)
        return False


def record(folder: Path) -> None:
    """Write down the digests of the folder's arrays."""
    write_json(folder / RECORD, _digests(folder))


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.npy")):
        with path.open("rb") as stream:
            found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _is_pickle(path: Path) -> bool:
    """Whether the file is neither an array of plain numbers nor torn."""
    with path.open("rb") as stream:
        magic = stream.read(len(np.lib.format.MAGIC_PREFIX))
    if magic != np.lib.format.MAGIC_PREFIX:
        return bool(magic)
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        # Torn arrays raise it too; numpy names the case in words only.
        return "allow_pickle" in str(error) or "object" in str(error).lower()
    return False
