"""Where a run stands: what its end needs to know, however it comes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.errors import MoeTrainError
from moe_train.run_folder.folder import RunFolder
from moe_train.run_folder.lock import FolderLock


@dataclass
class Standing:
    """Kept by the session, read by the runtime."""

    folder: RunFolder | None = None
    """The run folder, on rank 0."""
    lock: FolderLock | None = None
    """Keeps other jobs out of the folder, on rank 0."""
    logs: Path | None = None
    """The run folder's logs, on every rank, once the world is open."""
    taken_up: bool = False
    """Whether the folder's files speak of this run: a refused one leaves an earlier run's be."""
    step: int = 0
    """Completed steps."""
    fault: MoeTrainError | None = None
    """What ended the run, once that is known."""

    def join(self, logs: Path) -> None:
        """The world is open and its ranks share ``logs``."""
        self.logs = logs


class Follower:
    """Listener that passes everything on and keeps the standing's step."""

    def __init__(self, listener: Any, standing: Standing) -> None:
        self._listener, self._standing = listener, standing

    def on_step(self, record: dict[str, Any], result: Any) -> None:
        """A training step is done."""
        self._listener.on_step(record, result)
        self._standing.step = record["step"]

    def on_validation(self, record: dict[str, Any]) -> None:
        """A validation is done."""
        self._listener.on_validation(record)
