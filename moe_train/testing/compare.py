"""Comparison of two runs' curves: losses and gradient norms, and whether their routers agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_train.run_folder.metrics import read
from moe_train.testing.runs import Run

EARLY_STEPS = 6
EARLY, LATE = (1e-5, 1e-4), (1e-4, 1e-3)
"""Tolerated relative difference of (loss, gradient norm), to step EARLY_STEPS and after it.

Later steps are wider because rounding may decide a router's near-tie the other way."""


@dataclass(frozen=True)
class Difference:
    """Relative differences of two curves, step by step."""

    steps: list[int]
    loss: list[float]
    grad_norm: list[float]
    moved: list[int] | None = None
    """Token assignments that went to another expert in a step; None without expert counts."""

    def worst(self, name: str, early: bool) -> float:
        """Maximum of ``loss`` or ``grad_norm`` over early or late steps; 0 without any."""
        values: list[float] = getattr(self, name)
        return max(
            (v for s, v in zip(self.steps, values, strict=True) if (s <= EARLY_STEPS) == early),
            default=0.0,
        )

    def within(self, early: tuple[float, float] = EARLY, late: tuple[float, float] = LATE) -> bool:
        """Whether every step is inside the tolerances."""
        return all(
            self.worst(name, first) <= limit[index]
            for first, limit in ((True, early), (False, late))
            for index, name in enumerate(("loss", "grad_norm"))
        )

    def __str__(self) -> str:
        """One line a step, for a failing test."""
        moved = self.moved or [-1] * len(self.steps)
        rows = zip(self.steps, self.loss, self.grad_norm, moved, strict=True)
        head = "step  loss      grad_norm  assignments moved (-1: unknown)\n"
        return head + "\n".join(f"{s:4}  {a:.2e}  {b:.2e}   {m}" for s, a, b, m in rows)


def compare(run: Run, reference: Run) -> Difference:
    """Difference of ``run`` from ``reference``, over the steps that ``run`` has.

    Raises:
        AssertionError: the reference lacks a step, or ``run`` has none.
    """
    known = {record["step"]: record for record in reference.steps}
    steps = run.column("step")
    assert steps and set(steps) <= known.keys(), f"steps {steps} of {sorted(known)}"

    def relative(name: str) -> list[float]:
        return [
            abs(r[name] - known[r["step"]][name]) / abs(known[r["step"]][name]) for r in run.steps
        ]

    return Difference(steps, relative("loss"), relative("grad_norm"), _moved(run, reference))


def same_bits(run: Run, reference: Run) -> None:
    """Assert that the curves are bitwise equal, over the steps that ``run`` has.

    Raises:
        AssertionError: names the first step that differs.
    """
    known = {record["step"]: record for record in reference.steps}
    assert run.steps, "the run has no steps"
    for record in run.steps:
        other = known[record["step"]]
        for name in ("loss_hex", "grad_norm_hex"):
            assert record[name] == other[name], (
                f"step {record['step']}: {name} is {record[name]}, not {other[name]}"
            )


def _moved(run: Run, reference: Run) -> list[int] | None:
    tokens, expected = expert_tokens(run), expert_tokens(reference)
    steps = run.column("step")
    if not set(steps) <= tokens.keys() & expected.keys():
        return None
    return [int(np.abs(tokens[step] - expected[step]).sum() // 2) for step in steps]


def expert_tokens(run: Run) -> dict[int, NDArray[np.int64]]:
    """Tokens of every layer's every expert [layers, experts], by step."""
    path = run.folder / "experts" / "tokens.jsonl"
    return {record["step"]: np.array(record["tokens"]) for record in read(path)}
