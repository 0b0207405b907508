"""Whole runs of the program in a forked world, and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.run_folder.metrics import read
from moe_train.testing.world import run_world

QUIET = ["device=cpu", "log.wandb=disabled", "log.console=none"]


@dataclass
class Run:
    """What a finished run left behind."""

    codes: list[int]
    folder: Path
    records: list[dict[str, Any]]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Training lines, in order."""
        return [record for record in self.records if "loss" in record]

    def column(self, name: str) -> list[Any]:
        """One field of every training line."""
        return [record[name] for record in self.steps]


def train_run(
    folder: Path, overrides: Sequence[str], world: int = 1, timeout: float = 240.0
) -> Run:
    """Run ``train.py`` with ``overrides`` on ``world`` ranks; its folder is ``folder``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    named = [f"run.dir={folder.parent}", f"run.name={folder.name}"]
    codes = run_world(
        _train,
        world,
        [*QUIET, *named, *overrides],
        timeout=timeout,
        log=folder.with_suffix(".log"),
    )
    return Run(codes, folder, read(folder / "metrics.jsonl"))


def _train(rank: int, world: int, overrides: Sequence[str]) -> int:
    from moe_train.run.main import main

    return main(overrides)
