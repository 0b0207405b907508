"""Rehearse runs from any process: build the library, start a server in it, collect reports."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from moe_train.errors import ConfigError
from moe_train.rehearsal.library import build, environment, obstacle
from moe_train.rehearsal.rank import Case, RankReport, from_json

ALWAYS = (
    "device=cuda",
    "backend.kernels=torch",
    "log.wandb=disabled",
)
"""Overrides of every rehearsed run, before its own."""


def rehearse(
    cases: Sequence[Case], log: IO[str] | None = None, timeout: float = 600.0
) -> list[list[RankReport]]:
    """Run ``cases`` one after the other; reports by case and rank.

    Args:
        log: receives the ranks' output; None discards it.

    Raises:
        ConfigError: this machine cannot rehearse.
        subprocess.SubprocessError: the server failed or did not end in time.
    """
    if (why := obstacle()) is not None:
        raise ConfigError("rehearsal", why, "use a torch with CUDA, and install cc, gcc or clang")
    args = [asdict(case) | {"overrides": [*ALWAYS, *case.overrides]} for case in cases]
    with tempfile.TemporaryDirectory(prefix="moe_train-rehearsal-") as name:
        folder = Path(name)
        build(folder)
        questions, answers = folder / "cases.json", folder / "reports.json"
        questions.write_text(json.dumps(args))
        subprocess.run(
            [sys.executable, "-m", "moe_train.rehearsal.server", str(questions), str(answers)],
            env=environment(folder, devices=1, memory_gb=1),
            stdout=log or subprocess.DEVNULL,
            stderr=log or subprocess.DEVNULL,
            timeout=timeout,
            check=True,
        )
        return from_json(answers.read_text())
