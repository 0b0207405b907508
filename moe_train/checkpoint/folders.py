"""Names and life cycle of checkpoint folders: stage, commit by rename, keep K."""

from __future__ import annotations

import os
import re
import shutil
from itertools import count
from pathlib import Path

from moe_train.checkpoint.manifest import verify
from moe_train.errors import CheckpointError

_COMMITTED = re.compile(r"^step_(\d{8})$")
_STAGED = re.compile(r"^step_\d{8}\.(tmp|old)$")


def committed_name(step: int) -> str:
    """Folder name of a committed checkpoint."""
    return f"step_{step:08d}"


def staging_folder(root: Path, step: int) -> Path:
    """An empty folder to write into; leftovers of earlier attempts are removed.

    Raises:
        OSError: the disk refuses.
    """
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.iterdir():
        if _STAGED.match(leftover.name) and not leftover.is_symlink():
            shutil.rmtree(leftover)
    staging = root / f"{committed_name(step)}.tmp"
    staging.mkdir()
    return staging


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Flush a file's contents to the disk."""
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())


def commit(staging: Path) -> Path:
    """Give a complete staging folder its committed name, durably."""
    final = staging.with_suffix("")
    sync_folder(staging)
    if final.exists():
        # Saved again after a resume from an older step: same name, newer content.
        old = staging.with_suffix(".old")
        final.rename(old)
        staging.rename(final)
        shutil.rmtree(old)
    else:
        staging.rename(final)
    sync_folder(final.parent)
    return final


def take_back(root: Path) -> None:
    """Give a checkpoint its name again that a killed :func:`commit` had moved out of the way.

    Only for the job that holds the run folder: another one's commit may be between its renames.

    Raises:
        OSError: the disk refuses.
    """
    for old in root.iterdir():
        if _STAGED.match(old.name) and old.suffix == ".old" and not old.is_symlink():
            final = old.with_suffix("")
            if not final.exists():
                old.rename(final)
                sync_folder(root)


def committed(root: Path) -> list[Path]:
    """Committed checkpoints under ``root``, newest first."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _COMMITTED.match(p.name) and not p.is_symlink()]
    return sorted((p for p in found if p.is_dir()), key=lambda p: p.name, reverse=True)


def purge(newest: Path, keep: int) -> None:
    """Retire what the checkpoint just committed makes old; it itself always stays.

    Of the earlier steps the newest ``keep`` - 1 stay that are whole. Later steps belong to a
    history that this run has left (it went on from an earlier checkpoint, because they were
    damaged or by request): they are set aside under a name that is no checkpoint's, so that the
    newest name stays the newest state, and not deleted, because no newer one replaces them.

    Args:
        newest: a committed checkpoint that has been verified.

    Raises:
        OSError: the disk refuses.
    """
    for other in committed(newest.parent):
        if other.name > newest.name:
            _set_aside(other)
    drop_earlier(newest, keep)


def drop_earlier(newest: Path, keep: int) -> None:
    """Delete what is older than ``newest`` and not among the ``keep`` - 1 whole ones before it.

    A run that is taken up does this as well: the one before it may have been killed between a
    commit and its :func:`purge`, and nothing may be left to save.

    Args:
        newest: a committed checkpoint that has been verified.

    Raises:
        OSError: the disk refuses.
    """
    left = max(keep, 1) - 1
    for other in committed(newest.parent):
        if other.name >= newest.name:
            continue
        if left > 0 and _whole(other):
            left -= 1
        else:
            shutil.rmtree(other)


def _set_aside(folder: Path) -> None:
    for number in count(1):
        target = folder.with_name(f"{folder.name}.left{number}")
        if not target.exists():
            folder.rename(target)
            return


def _whole(folder: Path) -> bool:
    try:
        verify(folder, deep=False)
    except CheckpointError:
        return False
    return True
