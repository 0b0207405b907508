"""What a run that was hit has to show: the steps and the state of one that never was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_train.checkpoint.folders import committed
from moe_train.testing.compare import same_bits
from moe_train.testing.runs import QUIET, Run, train_run
from moe_train.testing.world import Outcome, run_world
from tests.support.carry import digests
from tests.support.faults import Fault, faulty, write_plan


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run."""

    run: Run
    state: dict[str, str]
    """Digest of every parameter and optimizer state at its end, by global key."""


def refer(folder: Path, overrides: Sequence[str], world: int) -> Reference:
    """Make the uninterrupted run of ``overrides`` on ``world`` ranks."""
    run = train_run(folder, overrides, world)
    assert run.codes == [0] * world, folder.with_suffix(".log").read_text()
    return Reference(run, final_state(run.folder))


def final_state(folder: Path) -> dict[str, str]:
    """Digests of the newest checkpoint of a run folder."""
    newest = committed(folder / "checkpoints")[0]
    [[result]] = run_world(digests, 1, [str(newest)])
    state: dict[str, str] = result
    return state


def hit(
    folder: Path, overrides: Sequence[str], world: int, faults: Sequence[Fault]
) -> list[Outcome]:
    """Start or continue the run in ``folder`` under ``faults``; how each rank ended."""
    outcomes: list[Outcome] = run_world(
        faulty,
        world,
        named(folder, overrides),
        str(notes(folder)),
        faults,
        log=folder.with_suffix(".log"),
        tolerate=True,
    )
    return outcomes


def launch(
    folder: Path, overrides: Sequence[str], world: int, faults: Sequence[Fault], *options: str
) -> subprocess.CompletedProcess[str]:
    """:func:`hit` by a real torchrun on one node, with more of its ``options``."""
    plan = write_plan(notes(folder), faults)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    program = ["-m", "tests.support.faults", str(plan), *named(folder, overrides)]
    return subprocess.run(
        [sys.executable, *launcher, *options, *program],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def named(folder: Path, overrides: Sequence[str]) -> list[str]:
    """Overrides of a quiet run on the CPU whose folder is ``folder``."""
    return [*QUIET, f"run.dir={folder.parent}", f"run.name={folder.name}", *overrides]


def notes(folder: Path) -> Path:
    """Where the faults of a run folder are kept."""
    return folder.with_name(f"{folder.name}.faults")


FAULTY = [
    *("experiment=twin", "parallel=single", "recompute=none", "model.layers=2", "model.hidden=32"),
    *("model.heads=4", "model.head_dim=8", "model.experts=8", "model.expert_hidden=16"),
    *("data.sequence=16", "batch.global=4", "optim.lr=3e-3", "train.eval_every=0"),
    "backend.timeout_seconds=60",
]
"""A model whose worlds start, train a few steps and end within seconds."""


def assert_same_curve(run: Run, reference: Reference) -> None:
    """Compare a run that was hit and has finished with the uninterrupted one, bit by bit.

    Raises:
        AssertionError: a step is missing or told twice, samples were left out or seen twice, or
            the first loss, gradient norm, parameter or optimizer state that differs.
    """
    for name in ("step", "consumed_samples", "consumed_tokens"):
        assert run.column(name) == reference.run.column(name), name
    same_bits(run, reference.run)
    state = final_state(run.folder)
    assert state.keys() == reference.state.keys()
    differing = [key for key, digest in state.items() if digest != reference.state[key]]
    assert not differing, f"{len(differing)} tensors differ, the first is {differing[0]}"
