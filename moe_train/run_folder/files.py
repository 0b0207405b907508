"""Files that a reader never sees half-written."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` by `text` (UTF-8): readers see the old content or the new.

    Args:
        durable: wait until the text is on the disk, so that this holds after a power failure too;
            a process that is killed needs no waiting.

    Raises:
        OSError: the folder is missing, read-only or full; `path` is then untouched.
    """
    # The process id keeps two writers of one path from sharing a temporary file.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
