"""The user's cache folder, shared by runs and ranks, and locks on what is made in it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from filelock import FileLock

from moe_train.errors import DataError


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
    except OSError as error:
        raise DataError(
            "data.cache", f"{folder} cannot be made: {error.strerror}", "set data.cache=FOLDER"
        ) from error
    try:
        # Permission bits do not say it: they are not asked for root, nor true on every file system.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            "data.cache", f"{folder} is not writable: {error.strerror}", "set data.cache=FOLDER"
        ) from error
    return folder


def lock(path: Path) -> FileLock:
    """Lock that one process of this machine holds at a time; it ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(path.name + ".lock"))
