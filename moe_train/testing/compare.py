"""Curves of two runs against each other: how far apart, and whether their routers agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_train.run_folder.metrics import read
from moe_train.testing.runs import QUIET, Run
from moe_train.testing.world import run_world

EARLY_STEPS = 6
EARLY, LATE = (1e-5, 1e-4), (1e-4, 1e-3)
"""Tolerated relative difference of (loss, gradient norm), to step EARLY_STEPS and after it.

Later steps are wider because a near-tie of a router may fall to the other side by rounding."""

ROUTING = "routing.npy"


@dataclass(frozen=True)
class Difference:
    """Largest relative differences between two curves; ``moved`` is routing, step by step."""

    steps: list[int]
    loss: list[float]
    grad_norm: list[float]
    moved: list[int] | None = None
    """Token assignments that went to another expert in a step; None where not recorded."""

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
        head = "step  loss      grad_norm  assignments moved (-1: not recorded)\n"
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
    """Hold the curves to be equal in every bit, over the steps that ``run`` has.

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


def routed_run(
    folder: Path, overrides: Sequence[str], world: int = 1, timeout: float = 280.0
) -> Run:
    """:func:`moe_train.testing.runs.train_run`, which also keeps every step's routing."""
    words = [*QUIET, f"run.dir={folder.parent}", f"run.name={folder.name}", *overrides]
    log = folder.with_suffix(".log")
    codes = run_world(_train, world, words, str(folder), timeout=timeout, log=log)
    told = log.read_text(errors="replace")[-4000:] if log.exists() else ""
    assert codes == [0] * world, f"exit codes {codes}\n{told}"
    return Run(codes, folder, read(folder / "metrics.jsonl"))


def _train(rank: int, world: int, words: Sequence[str], folder: str) -> int:
    from moe_train.run.main import main
    from moe_train.train import loop

    plain, tokens = loop.train_step, []

    def watched(*args: Any, **how: Any) -> Any:
        result = plain(*args, **how)
        tokens.append(result.routing.tokens_LE.numpy().copy())
        return result

    setattr(loop, "train_step", watched)  # noqa: B010 - mypy sees a function, not a variable
    code = main(words)
    if rank == 0 and tokens:
        np.save(Path(folder) / ROUTING, np.stack(tokens))
    return code


def _moved(run: Run, reference: Run) -> list[int] | None:
    ours, theirs = run.folder / ROUTING, reference.folder / ROUTING
    if not (ours.exists() and theirs.exists()):
        return None
    a: NDArray[np.float64] = np.load(ours)[-len(run.steps) :]
    b: NDArray[np.float64] = np.load(theirs)
    first = run.column("step")[0] - reference.column("step")[0]
    return [int(np.abs(x - y).sum() // 2) for x, y in zip(a, b[first:], strict=False)]
