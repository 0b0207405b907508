"""One voice for a failure that all ranks see: the first rank to notice it tells it."""

from __future__ import annotations

import os
from pathlib import Path

NAME = "cause"


def claim(logs: Path | None, text: str) -> bool:
    """Whether this rank is the first to tell why the run ends; ``text`` goes to ``logs/cause``.

    Without a folder every rank speaks for itself. A rank that claimed before is still the first.
    """
    if logs is None:
        return True
    try:
        with open(logs / NAME, "x", encoding="utf-8") as stream:
            stream.write(f"{_own()}{text}\n")
    except FileExistsError:
        return (logs / NAME).read_text(encoding="utf-8").startswith(_own())
    return True


def claimed(logs: Path | None) -> str | None:
    """What another rank said first about why the run ends; None where none did."""
    if logs is None:
        return None
    try:
        text = (logs / NAME).read_text(encoding="utf-8").rstrip()
    except OSError:
        return None
    # Created and not yet written is no cause.
    return None if not text or text.startswith(_own()) else text.partition(": ")[2]


def _own() -> str:
    return f"rank {os.environ.get('RANK', '0')}: "


def forget(logs: Path) -> None:
    """Clear what an earlier start of the run left (rank 0, before its peers train)."""
    (logs / NAME).unlink(missing_ok=True)
