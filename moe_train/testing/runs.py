"""Whole training runs in a world of forked ranks, and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.run_folder.metrics import read
from moe_train.testing.world import run_world
from moe_train.train.callback import Callback

QUIET = ["device=cpu", "log.wandb=disabled", "log.console=none"]
"""Overrides of every run: on the CPU, without W&B and step lines."""


@dataclass
class Run:
    """A finished run."""

    codes: list[int]
    """Exit code of each rank."""
    folder: Path
    records: list[dict[str, Any]]
    """Lines of metrics.jsonl."""

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Training lines, in order."""
        return [record for record in self.records if "loss" in record]

    def column(self, name: str) -> list[Any]:
        """One field of every training line."""
        return [record[name] for record in self.steps]


def train_run(
    folder: Path,
    overrides: Sequence[str],
    world: int = 1,
    timeout: float = 240.0,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Run ``train.py`` with ``overrides`` on ``world`` ranks; its run folder is ``folder``.

    Args:
        timeout: seconds for the whole run.
        callbacks: your own; each rank gets a pickled copy.

    Raises:
        RankFailed: a rank raised, died or did not end in time. Errors of
            :mod:`moe_train.errors` are exit codes of the run instead, with their messages in
            ``folder`` + ``.log``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    named = [f"run.dir={folder.parent}", f"run.name={folder.name}"]
    arguments = [*QUIET, *named, *overrides]
    log = folder.with_suffix(".log")
    codes = run_world(_train, world, arguments, callbacks, timeout=timeout, log=log)
    return Run(codes, folder, read(folder / "metrics.jsonl"))


def finished_run(
    folder: Path, overrides: Sequence[str], world: int = 1, timeout: float = 280.0
) -> Run:
    """:func:`train_run`, which must finish.

    Raises:
        AssertionError: a rank ended with another exit code; with the end of the log.
    """
    run = train_run(folder, overrides, world, timeout)
    output = folder.with_suffix(".log").read_text(errors="replace")[-4000:]
    assert run.codes == [0] * world, f"exit codes {run.codes}\n{output}"
    return run


def _train(rank: int, world: int, overrides: Sequence[str], callbacks: Sequence[Callback]) -> int:
    from moe_train.run.main import main

    return main(overrides, callbacks)
