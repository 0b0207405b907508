"""Comparison of loss curves; the CPU reference curves that ship with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import inf, isnan
from pathlib import Path
from typing import Any, NamedTuple

from moe_train.gpu_check.findings import Failed, Findings

REFERENCES = Path(__file__).with_name("reference")
FIELDS = ("step", "loss", "loss_hex", "grad_norm", "grad_norm_hex")


class Tolerance(NamedTuple):
    """Largest relative difference of loss and gradient norm, to step EARLY and after it."""

    loss: float
    norm: float
    late_loss: float
    late_norm: float


EARLY = 6
TOLERANCES = {
    "fp32": Tolerance(1e-5, 1e-4, 1e-4, 1e-3),
    "bf16": Tolerance(5e-3, 2e-2, 5e-3, 2e-2),
    "fp8": Tolerance(2e-2, 2e-1, 3e-2, 2e-1),
}
"""By dtype. See docs/gpu-check.md for what they are made from."""


def reference_path(dtype: str) -> Path:
    """File of a shipped curve."""
    return REFERENCES / f"curve_{dtype}.json"


def reference(dtype: str) -> dict[str, Any]:
    """A shipped curve: ``steps``, ``overrides``, ``weights`` and the versions that made it."""
    content: dict[str, Any] = json.loads(reference_path(dtype).read_text(encoding="utf-8"))
    return content


def differences(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm): relative differences over the steps of ``ours``.

    Raises:
        Failed: ``ours`` has no step, or one that ``theirs`` has not.
    """
    known = {record["step"]: record for record in theirs}
    if not ours:
        raise Failed("the run has no steps")
    rows = []
    for record in ours:
        other = known.get(record["step"])
        if other is None:
            raise Failed(f"step {record['step']} is not in the reference")
        pairs = [(record[name], other[name]) for name in ("loss", "grad_norm")]
        rows.append((record["step"], *(_relative(a, b) for a, b in pairs)))
    return rows


def _relative(a: float | None, b: float) -> float:
    """Relative difference; infinite for what is no number (metrics.jsonl has null for NaN)."""
    off = inf if a is None else abs(a - b) / abs(b)
    return inf if isnan(off) else off


def same_bits(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether loss and gradient norm are equal in every bit, over the steps of ``ours``."""
    known = {record["step"]: record for record in theirs}
    return all(
        record[name] == known[record["step"]][name]
        for record in ours
        for name in ("loss_hex", "grad_norm_hex")
    )


def judge(
    findings: Findings,
    name: str,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    dtype: str,
) -> None:
    """Note how far two curves are apart, and fail where that is beyond the dtype's tolerance."""
    rows, allowed = differences(ours, theirs), TOLERANCES[dtype]
    worst = {
        prefix + name: max((row[column] for row in part), default=0.0)
        for prefix, part in (
            ("", [row for row in rows if row[0] <= EARLY]),
            ("late_", [row for row in rows if row[0] > EARLY]),
        )
        for column, name in ((1, "loss"), (2, "norm"))
    }
    row = {"run": name, "steps": f"{rows[0][0]}-{rows[-1][0]}", **worst,
           "every bit equal": same_bits(ours, theirs)}  # fmt: skip
    findings.note(relative_differences=[*findings.figures.get("relative_differences", []), row])
    for key, limit in allowed._asdict().items():
        if worst[key] > limit:
            findings.fail(f"{name}: {key.replace('_', ' ')} differs by {worst[key]:.2e}, "
                          f"more than {limit:.0e} for {dtype}")  # fmt: skip
