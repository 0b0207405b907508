"""The data cache: its folder, locks, and checks of Megatron's sample indices in it.

Megatron reads the indices with ``numpy.load(allow_pickle=True)``. They can be built again at any
time, so damage costs seconds; a pickle in their place is no accident and is refused.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import Timeout

from moe_train.errors import DataError
from moe_train.files import file_digest, kernel_lock, write_json

LOGGER = logging.getLogger(__name__)
RECORD = "sha256.json"


def cache_folder(configured: str | Path | None = None) -> Path:
    """Folder of prepared corpora and index caches, made if need be.

    Args:
        configured: ``data.cache``; None is ``$XDG_CACHE_HOME/moe_train`` or
            ``~/.cache/moe_train``.

    Raises:
        DataError: the folder cannot be written.
    """
    if configured is not None:
        folder = Path(configured).expanduser()
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_train"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not by permission bits: root ignores them, and some file systems report them wrongly.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            "data.cache", f"{folder} is not writable: {error.strerror}", "set data.cache=FOLDER"
        ) from error
    return folder


@contextmanager
def lock(
    path: Path,
    *,
    timeout: float = -1.0,
    field: str = "data.cache",
    fix: str = "set data.cache=FOLDER, on a file system with locks",
) -> Iterator[None]:
    """Lock that one process holds at a time, in the file ``PATH.lock``; it ends with its process.

    Args:
        timeout: seconds to wait for another holder; negative: for ever.
        field: for the error.
        fix: for the error.

    Raises:
        DataError: the file cannot be opened, or its file system has no locks.
        Timeout: another process holds it.
    """
    file = path.with_name(path.name + ".lock")
    kernel = kernel_lock(file, timeout)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        kernel.acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(field, f"{file} cannot be locked: {reason}", fix) from error
    try:
        yield
    finally:
        kernel.release()


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


def indices_unchanged(folder: Path) -> bool:
    """Whether the folder holds what :func:`record_indices` saw, and no other array."""
    try:
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return isinstance(recorded, dict) and recorded == _digests(folder)
    except FileNotFoundError:
        return not any(folder.glob("*.npy"))
    except (OSError, ValueError, RecursionError) as error:
        LOGGER.warning("%s cannot be read: %s", folder / RECORD, error)
        return False


def record_indices(folder: Path) -> None:
    """Record the digests of the folder's arrays for :func:`indices_unchanged`."""
    write_json(folder / RECORD, _digests(folder))


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.npy"))}


def _is_pickle(path: Path) -> bool:
    """Whether the file is neither an array of plain numbers nor torn."""
    with path.open("rb") as stream:
        magic = stream.read(len(np.lib.format.MAGIC_PREFIX))
    if magic != np.lib.format.MAGIC_PREFIX:
        return bool(magic)
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        # Torn arrays raise it too; numpy tells the cases apart by its message only.
        return "allow_pickle" in str(error) or "object" in str(error).lower()
    return False
