"""status.json after a resume that failed and after a final status that cannot be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.errors import EXIT_CHECKPOINT, CheckpointError
from moe_train.run_folder.status import Status, read_status
from moe_train.testing.runs import QUIET
from moe_train.testing.world import run_world
from tests.support.survival import FAULTY

pytestmark = pytest.mark.world


def fails_twice(rank: int, world: int, overrides: list[str], path: str) -> list[Status | None]:
    """Finish a run; fail to load its checkpoint; train on and fail to write the final status."""
    from moe_train.run import failure, restore
    from moe_train.run.main import main

    statuses = []
    assert main([*overrides, "train.steps=2"]) == 0
    statuses.append(read_status(Path(path)))

    def damaged(*_: object, **__: object) -> None:
        raise CheckpointError("shard", "changed after it was verified")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "load_checkpoint", damaged)
        assert main([*overrides, "train.steps=3"]) == EXIT_CHECKPOINT
    statuses.append(read_status(Path(path)))

    write = failure.write_status

    def full(path: Path, state: Any, *args: Any) -> None:
        if state == "finished":
            raise OSError(28, "No space left on device")
        write(path, state, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(failure, "write_status", full)
        main([*overrides, "train.steps=3"])
    statuses.append(read_status(Path(path)))
    return statuses


def test_a_failure_replaces_the_status_of_the_run_before(tmp_path: Path) -> None:
    overrides = [*QUIET, *FAULTY, "checkpoint.every=2", f"run.dir={tmp_path}", "run.name=run"]
    log, path = tmp_path / "log", tmp_path / "run" / "status.json"
    [(finished, unloaded, unwritten)] = run_world(fails_twice, 1, overrides, str(path), log=log)
    assert finished == Status("finished", 2)
    assert (unloaded.state, unloaded.step) == ("failed", 2)
    assert "changed after it was verified" in unloaded.reason
    assert (unwritten.state, unwritten.step) == ("failed", 3)
    assert "No space left" in unwritten.reason
