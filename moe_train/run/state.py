"""State of a run that its final status and failure report need, whatever ends it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from moe_train.config.kernels import KernelChoice
from moe_train.config.schema import to_mapping
from moe_train.errors import MoeTrainError
from moe_train.files import write_atomically
from moe_train.parallel.resolved import ResolvedRun
from moe_train.run_folder.folder import RunFolder
from moe_train.run_folder.status import write_status
from moe_train.train.callback import Callback, RollbackEvent, StartEvent, StepEvent


@dataclass(eq=False)
class RunState(Callback):
    """Updated while the run opens and trains; read when it ends."""

    required = True

    folder: RunFolder | None = None
    """The run folder, on rank 0."""
    lock: FileLock | None = None
    """Keeps other jobs out of the folder, on rank 0."""
    logs: Path | None = None
    """The run folder's logs, on every rank, once the world is open."""
    owns_folder: bool = False
    """Whether the folder's status is this run's: a refused run leaves an earlier run's files."""
    continues: bool = False
    """Whether the folder holds the files of an earlier start, on rank 0."""
    step: int = 0
    """Completed steps."""
    error: MoeTrainError | None = None
    """Why the run ends, once that is known."""

    def join(self, logs: Path) -> None:
        """The world is open and its ranks share ``logs``: a failure from here on is the run's."""
        self.logs = logs
        self.owns_folder = True

    def refuse(self) -> None:
        """The run cannot continue the earlier one in its folder, whose status stands."""
        self.owns_folder = not self.continues

    def on_start(self, event: StartEvent) -> None:
        """Keep the step."""
        self.step = event.step

    def on_step(self, event: StepEvent) -> None:
        """Keep the step."""
        self.step = event.step

    def on_rollback(self, event: RollbackEvent) -> None:
        """Keep the step."""
        self.step = event.step

    def describe(self, run: ResolvedRun, kernels: KernelChoice | None = None) -> None:
        """Write config.yaml, plan.json and the running status: the folder is this run's (rank 0).

        Args:
            kernels: the kernel set, once it is chosen.
        """
        from moe_train.planner.estimate import estimate

        folder = self.folder
        assert folder is not None
        folder.write_config(to_mapping(run.config))
        report = estimate(run).report(kernels)
        write_atomically(folder.plan, json.dumps(report, indent=1) + "\n")
        write_status(folder.status, "running", self.step)
        self.owns_folder = True
