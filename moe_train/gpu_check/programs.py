"""Training runs as child processes: one rank, or several under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.gpu_check.findings import Failed
from moe_train.gpu_check.workers import ROOT, end_with_parent, environment, kill_group, tail
from moe_train.run_folder.metrics import read

PROGRAM = ["-m", "moe_train.cli", "train"]
PLANTED = ["-m", "moe_train.gpu_check.plant"]


@dataclass(frozen=True)
class Ended:
    """Exit code, output and files of a finished run."""

    code: int
    """Exit code of its first process; negative for a signal."""
    folder: Path
    output: str
    """The end of what it printed."""

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Training lines of metrics.jsonl."""
        return training_lines(self.folder)

    @property
    def status(self) -> dict[str, Any]:
        """status.json; empty where there is none."""
        return read_json(self.folder / "status.json")

    @property
    def plan(self) -> dict[str, Any]:
        """plan.json; empty where there is none."""
        return read_json(self.folder / "plan.json")

    def finished(self) -> Ended:
        """This run.

        Raises:
            Failed: it did not end with exit code 0 and the status finished.
        """
        if self.code != 0 or self.status.get("state") != "finished":
            raise Failed(f"{self.folder.name}: exit code {self.code}, status {self.status}\n"
                         f"its last output:\n{self.output}")  # fmt: skip
        return self


def launch(
    folder: Path,
    overrides: Sequence[str],
    ranks: int,
    seconds: float,
    *,
    plant: Sequence[str] = (),
    extra: Mapping[str, str] | None = None,
) -> Ended:
    """Train in ``folder`` and wait.

    Args:
        ranks: above 1, under torchrun.
        seconds: after these the run is killed and has failed.
        plant: arguments of :mod:`moe_train.gpu_check.plant`, which then is the program.
        extra: more of its environment.

    Raises:
        Failed: it did not end in time.
    """
    program = [*PLANTED, *plant] if plant else PROGRAM
    arguments = [*program, *overrides, f"run.dir={folder.parent}", f"run.name={folder.name}"]
    code, output = start(folder.with_suffix(".log"), arguments, ranks, seconds, extra or {})
    return Ended(code, folder, output)


def start(
    log: Path, arguments: Sequence[str], ranks: int, seconds: float, extra: Mapping[str, str]
) -> tuple[int, str]:
    """Run ``python arguments...`` on ``ranks`` ranks and wait; returns exit code and output's end.

    Raises:
        Failed: it did not end in time, and was killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        arguments = [*launcher, *arguments]
    offset = log.stat().st_size if log.exists() else 0
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(extra),
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    try:
        return process.wait(max(0.1, seconds)), tail(log, offset)
    except subprocess.TimeoutExpired:
        raise Failed(f"{log.stem} did not end in the {seconds:.0f} s left to it\n"
                     f"its last output:\n{tail(log, offset)}") from None  # fmt: skip
    finally:
        kill_group(process)


def training_lines(folder: Path) -> list[dict[str, Any]]:
    """Training lines of a run folder's metrics.jsonl, in order."""
    return [record for record in read(folder / "metrics.jsonl") if "loss" in record]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is missing or torn."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
