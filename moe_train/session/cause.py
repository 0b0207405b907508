"""One voice for a failure that all ranks see: the first rank to notice it tells it."""

from __future__ import annotations

import os
from pathlib import Path

NAME = "cause"


def claim(logs: Path | None, text: str) -> bool:
    """Whether this rank is the first to tell why the run ends; ``text`` goes to ``logs/cause``.

    Without a folder every rank speaks for itself.
    """
    if logs is None:
        return True
    try:
        with open(logs / NAME, "x", encoding="utf-8") as stream:
            stream.write(f"rank {os.environ.get('RANK', '0')}: {text}\n")
    except FileExistsError:
        return False
    return True


def forget(logs: Path) -> None:
    """Clear what an earlier start of the run left (rank 0, before its peers train)."""
    (logs / NAME).unlink(missing_ok=True)
