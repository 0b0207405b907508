"""State of a run that its final status and failure report need, whatever ends it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.errors import MoeTrainError
from moe_train.run_folder.folder import RunFolder
from moe_train.run_folder.lock import FolderLock


@dataclass
class RunState:
    """Updated while the run opens and trains; read when it ends."""

    folder: RunFolder | None = None
    """The run folder, on rank 0."""
    lock: FolderLock | None = None
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


class Follower:
    """Listener that passes everything on and keeps the run state's step."""

    def __init__(self, listener: Any, state: RunState) -> None:
        self._listener, self._state = listener, state

    def on_step(self, record: dict[str, Any], result: Any) -> None:
        """A training step is done."""
        self._listener.on_step(record, result)
        self._state.step = record["step"]

    def on_validation(self, record: dict[str, Any]) -> None:
        """A validation is done."""
        self._listener.on_validation(record)
