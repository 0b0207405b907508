"""Short real runs of candidates of a search, and the cost model refitted to what they took.

Which candidates run is decided one by one: the first is the search's choice, the next the fastest
of the rest by the cost model as refitted to the runs so far. Then all of them run again in turn, so
that what else the machine does meets them alike; medians of their steps decide.

The refit scales groups of the step's terms, each by one factor. With few runs factors are drawn
towards 1: by how far a profile's figures are usually off (`PRIOR`), against how far a model with
the right factors still is (`BAND`).
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_train.errors import ConfigError
from moe_train.planner.plan import BAND
from moe_train.planner.search import Candidate
from moe_train.planner.search.terms import BUBBLE, NAMES, RECOMPUTED, step_terms
from moe_train.run_folder.metrics import read

STEPS, WARM = 8, 3
"""Steps of a trial, and those at its start that are not counted."""
ROUNDS = 3
"""Trials of each candidate."""
PRIOR = math.log(2)
"""Standard deviation of a factor's logarithm: assumed."""
GROUPS = {
    NAMES["dense"]: "compute",
    NAMES["experts"]: "compute",
    RECOMPUTED: "compute",
    "optimizer": "compute",
    NAMES["tensor"]: "communication",
    NAMES["exchange"]: "communication",
    "gradients and weights of replicas": "communication",
    BUBBLE: "waiting",
    "waiting for cores": "waiting",
}
"""Group of each term; others are a group together."""
QUIET = (
    "log.wandb=disabled", "log.console=none", "checkpoint.every=0", "checkpoint.resume=never",
    "train.eval_every=0", f"train.steps={STEPS}",
)  # fmt: skip


@dataclass
class Trial:
    """A candidate and the seconds of its counted steps, over all rounds."""

    candidate: Candidate
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


Runner = Callable[[Candidate, Path], list[float]]
"""Runs a candidate in a folder; seconds of its counted steps."""


def measure(pool: Sequence[Candidate], count: int, folder: Path, run: Runner) -> list[Trial]:
    """Run `count` candidates of `pool` in `ROUNDS` rounds; the fastest first.

    Args:
        pool: candidates by predicted time, more than `count` of them.
        folder: where runs write.
        run: how a candidate is run.
    """
    trials: list[Trial] = []
    grouped = {id(one): groups(one) for one in pool}
    while len(trials) < min(count, len(pool)):
        factors = refit([(grouped[id(one.candidate)], one.median) for one in trials])
        rest = [one for one in pool if all(one is not known.candidate for known in trials)]
        best = min(rest, key=lambda one: predicted(grouped[id(one)], factors))
        trials.append(Trial(best, run(best, folder / f"round_0_{len(trials)}")))
    for number in range(1, ROUNDS):
        for index, trial in enumerate(trials):
            trial.seconds += run(trial.candidate, folder / f"round_{number}_{index}")
    return sorted(trials, key=lambda one: one.median)


def groups(candidate: Candidate) -> dict[str, float]:
    """A candidate's predicted seconds by group of terms."""
    sums: dict[str, float] = {}
    for term, seconds in step_terms(candidate.plan, candidate.time).items():
        name = GROUPS.get(term, "other")
        sums[name] = sums.get(name, 0.0) + seconds
    return sums


def predicted(sums: Mapping[str, float], factors: Mapping[str, float]) -> float:
    """Seconds with each group scaled by its factor."""
    return sum(seconds * factors.get(name, 1.0) for name, seconds in sums.items())


def refit(runs: Sequence[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """Factors of the groups that explain `runs`, pairs of predicted groups and measured seconds.

    Nonlinear least squares of the logarithms: one residual for each run, in units of the band, and
    one for each factor, in units of `PRIOR`. All are 1 without runs.
    """
    from scipy.optimize import least_squares

    names = sorted({name for sums, _ in runs for name in sums})
    if not names:
        return {}

    def residuals(logs: Sequence[float]) -> list[float]:
        factors = {name: math.exp(log) for name, log in zip(names, logs, strict=True)}
        off = [math.log(predicted(sums, factors) / measured) / BAND for sums, measured in runs]
        return [*off, *(log / PRIOR for log in logs)]

    solution = least_squares(residuals, [0.0] * len(names))
    return {name: math.exp(log) for name, log in zip(names, solution.x, strict=True)}


def launched(overrides: Sequence[str], base_overrides: Callable[[Candidate], list[str]]) -> Runner:
    """Runner that starts the ranks of a candidate here, as ``make train`` does.

    Args:
        overrides: the user's.
        base_overrides: those that make a candidate of them.
    """

    def run(candidate: Candidate, folder: Path) -> list[float]:
        world = candidate.layout.world
        place = [f"run.dir={folder.parent}", f"run.name={folder.name}"]
        arguments = [*overrides, *base_overrides(candidate), *QUIET, *place]
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={world}", "-m", "moe_train.cli", "train", *arguments,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            output = (done.stdout + done.stderr).strip().splitlines()
            lines = [line for line in output if line.startswith("moe-train")] or output
            raise ConfigError(
                "--measure",
                f"{candidate.layout.tag} does not run here: " + "\n".join(lines[-4:]),
                "plan for this machine's devices, or measure where the others are",
            )
        steps = [one for one in read(folder / "metrics.jsonl") if "step_seconds" in one]
        assert len(steps) == STEPS, f"{folder.name} has {len(steps)} steps"
        return [float(one["step_seconds"]) for one in steps[WARM:]]

    return run


def trials_report(
    trials: Sequence[Trial], pool: Sequence[Candidate], lines: Callable[[Candidate], list[str]]
) -> dict[str, Any]:
    """Plain data of finished trials, the fastest first, and of the best that did not run.

    Args:
        lines: a candidate's overrides.
    """
    factors = refit([(groups(one.candidate), one.median) for one in trials])

    def row(candidate: Candidate) -> dict[str, Any]:
        return {
            "layout": candidate.layout.tag,
            "overrides": lines(candidate),
            "predicted_seconds": candidate.seconds,
            "refitted_seconds": predicted(groups(candidate), factors),
        }

    ran = [id(one.candidate) for one in trials]
    rest = [row(one) for one in pool if id(one) not in ran]
    return {
        "trials": [
            {**row(one.candidate), "median_seconds": one.median, "seconds": one.seconds}
            for one in trials
        ],
        "factors": factors,
        "unmeasured": min(rest, key=lambda one: one["refitted_seconds"], default=None),
    }
