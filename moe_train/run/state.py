"""State of a run that its final status and failure report need, whatever ends it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from moe_train.errors import MoeTrainError
from moe_train.run_folder.folder import RunFolder
from moe_train.train.callback import Callback, StartEvent, StepEvent


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
    """Whether the folder's files describe this run: a refused run keeps an earlier run's files."""
    step: int = 0
    """Completed steps."""
    error: MoeTrainError | None = None
    """Why the run ends, once that is known."""

    def join(self, logs: Path) -> None:
        """The world is open and its ranks share ``logs``."""
        self.logs = logs

    def on_start(self, event: StartEvent) -> None:
        """Keep the step."""
        self.step = event.step

    def on_step(self, event: StepEvent) -> None:
        """Keep the step."""
        self.step = event.step

    def on_rollback(self, step: int) -> None:
        """Keep the step."""
        self.step = step
