"""A number with a name, its formula and where the formula comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

KORTHIKANTI = "Korthikanti et al., arXiv:2205.05198, section 4"
MEGATRON = "what Megatron-Core 0.19 saves for backward"
HOST = "what torch's own kernels save for backward"


@dataclass(frozen=True)
class Term:
    """One summand of a memory estimate, in bytes."""

    name: str
    bytes: float
    formula: str
    """In the letters of `moe_train.parallel.shapes`."""
    source: str


def total(terms: Iterable[Term]) -> float:
    """Sum of the terms' bytes."""
    return sum(term.bytes for term in terms)
