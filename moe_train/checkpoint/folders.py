"""Checkpoint folders on disk: staging, atomic commit by rename, recovery and pruning.

``step_00000020`` is a committed checkpoint. Every other name is garbage: ``.tmp`` is being written,
``.old`` is being replaced by a newer save of the same step, ``.superseded-K`` belongs to a history
that the run no longer continues (``.leftK`` in version 0.1).
"""

from __future__ import annotations

import os
import re
import shutil
from itertools import count
from pathlib import Path

from moe_train.checkpoint.manifest import verify
from moe_train.errors import CheckpointError

_COMMITTED = re.compile(r"step_\d{8}")
_STAGED = re.compile(r"step_\d{8}\.(tmp|old)")
_SUPERSEDED = re.compile(r"(step_\d{8})\.(superseded-|left)\d+")

SPACE_FACTOR = 1.02
"""Headers of the items and file-system blocks: measured at 0.5 % for items of 100 KB."""
FIXED_BYTES = 1 << 20
"""Bytes for the index, the manifest and the folder itself."""


def committed_name(step: int) -> str:
    """Folder name of a committed checkpoint."""
    return f"step_{step:08d}"


def committed(root: Path) -> list[Path]:
    """Committed checkpoints under ``root``, newest first."""
    return sorted(_matching(root, _COMMITTED), reverse=True)


def staging_folder(root: Path, step: int) -> Path:
    """An empty folder to write into; leftovers of interrupted saves are removed.

    Raises:
        OSError: the disk refuses.
    """
    root.mkdir(parents=True, exist_ok=True)
    for leftover in _matching(root, _STAGED):
        shutil.rmtree(leftover)
    staging = root / f"{committed_name(step)}.tmp"
    staging.mkdir()
    return staging


def check_free_space(root: Path, size: int) -> None:
    """Refuse to begin a checkpoint of ``size`` bytes of tensors that does not fit on the disk.

    Raises:
        OSError: too little is free; says what is needed and what is there.
    """
    needed, free = int(size * SPACE_FACTOR) + FIXED_BYTES, shutil.disk_usage(root).free
    if free < needed:
        raise OSError(
            f"{root} has {free / 2**20:,.1f} MiB free and this checkpoint needs "
            f"{needed / 2**20:,.1f} MiB; lower checkpoint.keep to free space"
        )


def commit(staging: Path) -> Path:
    """Rename a complete staging folder to its committed name, durably.

    The rename is what makes the checkpoint visible to :func:`committed`, and so to a resume.
    """
    final = staging.with_suffix("")
    _sync_folder(staging)
    if final.exists():
        # Saved again after a resume from an older step: same name, newer content.
        old = staging.with_suffix(".old")
        final.rename(old)
        staging.rename(final)
        shutil.rmtree(old)
    else:
        staging.rename(final)
    _sync_folder(final.parent)
    return final


def recover_interrupted_commit(root: Path) -> None:
    """Undo the first rename of a :func:`commit` that was killed before its second.

    Only for the job that holds the run folder: another one's commit may be between its renames.

    Raises:
        OSError: the disk refuses.
    """
    for old in _matching(root, _STAGED):
        final = old.with_suffix("")
        if old.suffix == ".old" and not final.exists():
            old.rename(final)
            _sync_folder(root)


def quarantine_later(newest: Path) -> None:
    """Rename committed checkpoints of later steps than ``newest`` to ``.superseded-K``.

    The run went on from an earlier checkpoint, because later ones were damaged or by request. The
    highest committed step must stay the newest state.

    Raises:
        OSError: the disk refuses.
    """
    for other in committed(newest.parent):
        if other.name > newest.name:
            targets = (other.with_name(f"{other.name}.superseded-{number}") for number in count(1))
            other.rename(next(target for target in targets if not target.exists()))


def prune(newest: Path, keep: int) -> None:
    """Delete what is older than ``newest`` but for the ``keep`` - 1 newest whole checkpoints.

    Superseded ones go once the run has reached their step again. A resumed run prunes as well: the
    run before it may have been killed between a commit and its pruning.

    Args:
        newest: a committed checkpoint that has been verified; it always stays.

    Raises:
        OSError: the disk refuses.
    """
    root, left = newest.parent, max(keep, 1) - 1
    for other in committed(root):
        if other.name >= newest.name:
            continue
        if left > 0 and _whole(other):
            left -= 1
        else:
            shutil.rmtree(other)
    for superseded in _matching(root, _SUPERSEDED):
        if superseded.stem <= newest.name:
            shutil.rmtree(superseded)


def _matching(root: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Folders under ``root`` whose whole name matches; links are neither used nor followed."""
    if not root.is_dir():
        return []
    return [
        path
        for path in root.iterdir()
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def _whole(folder: Path) -> bool:
    try:
        verify(folder, deep=False)
    except CheckpointError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
