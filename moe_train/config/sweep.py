"""Names for the jobs of a sweep, so that each has a run folder of its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

LONGEST = 100
"""Characters of a suffix; a longer one is cut and made unique by its hash."""


def suffixes(jobs: Sequence[Sequence[str]]) -> list[str]:
    """What to add to the run's name for each job: the values in which the jobs differ.

    ``[[a=1, b=3], [a=2, b=3]]`` gives ``-a-1`` and ``-a-2``: the same job has the same name when
    the sweep is started again or grows, so it continues its own run and no other's. A sweep over
    ``run.name`` names its jobs itself.

    Args:
        jobs: overrides of each job, in one order, as ``expand_multirun`` gives them.
    """
    varied = [
        place
        for place, words in enumerate(zip(*jobs, strict=True))
        if len(set(words)) > 1 and not words[0].startswith("run.name=")
    ]
    return [_suffix([job[place] for place in varied]) for job in jobs]


def _suffix(overrides: Sequence[str]) -> str:
    plain = [re.sub(r"[^A-Za-z0-9._+]+", "-", o).strip("-") for o in overrides]
    text = "".join(f"-{word}" for word in plain)
    # Two values may look alike once they are plain: the hash tells them apart.
    exact = all(re.fullmatch(r"[A-Za-z0-9._+]+=[A-Za-z0-9._+-]+", o) for o in overrides)
    if exact and len(text) <= LONGEST:
        return text
    digest = hashlib.sha256("\0".join(overrides).encode()).hexdigest()[:8]
    return f"{text[:LONGEST]}-{digest}"
