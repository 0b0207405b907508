"""Sweeps (``--multirun``): the jobs that a list of overrides stands for, and their names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from moe_train.config.compose import parse_overrides
from moe_train.errors import ConfigError, ConfigFaults

LONGEST = 100
"""Characters of a suffix; a longer one is cut and made unique by its hash."""


def expand_multirun(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs of a sweep: ``a=1,2 b=3`` gives ``[[a=1, b=3], [a=2, b=3]]``.

    Hydra's own sweeper semantics: choices, ``range(...)``, ``choice(...)``, ``glob(...)``.

    Raises:
        ConfigFaults: malformed overrides.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    faults: list[ConfigError] = []
    parsed = parse_overrides(overrides, faults)
    if faults:
        raise ConfigFaults(faults)
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(run) for batch in batches for run in batch]


def suffixes(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Suffix of the run's name for each job: the values in which the jobs differ.

    ``[[a=1, b=3], [a=2, b=3]]`` gives ``-a-1`` and ``-a-2``: the same job has the same name when
    the sweep is started again or grows, so it continues its own run and no other's. A sweep over
    ``run.name`` names its jobs itself.

    Args:
        jobs: overrides of each job, in one order, as ``expand_multirun`` gives them.
    """
    varied = [
        index
        for index, values in enumerate(zip(*jobs, strict=True))
        if len(set(values)) > 1 and not values[0].startswith("run.name=")
    ]
    return [_suffix([job[index] for index in varied]) for job in jobs]


def _suffix(overrides: Sequence[str]) -> str:
    plain = [re.sub(r"[^A-Za-z0-9._+]+", "-", o).strip("-") for o in overrides]
    text = "".join(f"-{part}" for part in plain)
    # Two values may look alike once they are plain: the hash tells them apart.
    exact = all(re.fullmatch(r"[A-Za-z0-9._+]+=[A-Za-z0-9._+-]+", o) for o in overrides)
    if exact and len(text) <= LONGEST:
        return text
    digest = hashlib.sha256("\0".join(overrides).encode()).hexdigest()[:8]
    return f"{text[:LONGEST]}-{digest}"
