"""The definition of one check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_train.gpu_check.bench import Bench
from moe_train.gpu_check.findings import Findings


@dataclass(frozen=True)
class Check:
    """One check: name, question, GPUs needed, time budget, function."""

    name: str
    asks: str
    """The question, one line."""
    gpus: int
    """GPUs that it needs."""
    seconds: int
    """Time budget; a check that takes longer is ended and has failed."""
    run: Callable[[Bench, Findings], None]
    cpu: bool = False
    """Whether its machinery also runs with --device cpu, at a tiny size."""
