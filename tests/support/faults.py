"""Faults at chosen points of a run: a rank, or the launcher, is killed or signalled there, once.

In a forked world :func:`faulty` is the function to run. Under a real launcher this module is the
program: ``torchrun ... -m tests.support.faults PLAN [overrides]``, with a file from
:func:`write_plan`; each rank leaves its exit code beside it, which torchrun does not tell.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

LAUNCHER = -1
"""The victim that is no rank: the process that started rank 0."""


@dataclass(frozen=True)
class Fault:
    """What happens when a run comes to a point."""

    point: str
    """One of POINTS."""
    step: int
    """Steps begun when the point is reached, in this start of the run; 0 is before the first."""
    victim: int
    """Rank that is hit, or LAUNCHER."""
    signal: int = signal.SIGKILL
    text: str = ""
    """Not empty: instead of a signal, torch's error of a device out of memory, with this text."""


@dataclass(frozen=True)
class _Place:
    """A function of the program, and on which side of it the point lies."""

    module: str
    name: str
    after: bool = False
    root: bool = False
    """Only rank 0 comes by: it hits the victim, which waits for it in the next collective."""


POINTS = {
    "plan": _Place("moe_train.run.main", "resolve_on_all_ranks"),
    "build": _Place("moe_train.train.engine", "build_model"),
    "open": _Place("moe_train.run.training", "restore"),
    "load": _Place("moe_train.run.restore", "load_checkpoint"),
    "forward": _Place("moe_train.train.step", "forward_step"),
    "backward": _Place("megatron.core.pipeline_parallel.schedules", "backward_step"),
    "update": _Place("moe_train.train.step", "clip_gradients"),
    "updated": _Place("moe_train.train.loop", "train_step", after=True),
    "validation": _Place("moe_train.train.loop", "validate"),
    "before shards": _Place("moe_train.checkpoint.write", "ShardWriter.write"),
    "after shards": _Place("moe_train.checkpoint.write", "ShardWriter.write", after=True),
    "before manifest": _Place("moe_train.checkpoint.manifest", "Manifest.write", root=True),
    "before rename": _Place("moe_train.checkpoint.folders", "commit", root=True),
    "after rename": _Place("moe_train.checkpoint.folders", "commit", after=True, root=True),
    "during purge": _Place("shutil", "rmtree", root=True),
    "closing": _Place("moe_train.backend.groups", "close_world"),
    "final status": _Place("moe_train.run.failure", "write_final_status"),
}
SAVING = ("before shards", "after shards", "before manifest", "before rename", "after rename",
          "during purge")  # fmt: skip
"""The phases of a save, in their order."""


def faulty(
    rank: int, world: int, overrides: Sequence[str], folder: str, faults: Sequence[Fault]
) -> int:
    """Train with ``overrides`` under ``faults``; returns the rank's exit code.

    Args:
        folder: what the ranks tell each other for this: process ids, and which faults are done.
    """
    from moe_train.run.main import main

    _Injector(Path(folder), rank, faults).install()
    return main(overrides)


class _Injector:
    """One rank's points."""

    def __init__(self, folder: Path, rank: int, faults: Sequence[Fault]) -> None:
        self._folder, self._rank, self._faults = folder, rank, faults
        self._step = 0

    def install(self) -> None:
        """Lay the points around the program's functions, in this process."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"rank_{self._rank}.pid").write_text(str(os.getpid()))
        self._wrap("moe_train.train.loop", "train_step", self._begin, None)
        for point in {fault.point for fault in self._faults}:
            place = POINTS[point]
            reach = self._torn if point == "during purge" else self._reach
            self._wrap(place.module, place.name, *self._sides(reach, point, place.after))

    def _sides(self, reach: Any, point: str, after: bool) -> tuple[Any, Any]:
        def here(*args: Any, **how: Any) -> None:
            reach(point, args)

        return (None, here) if after else (here, None)

    def _wrap(self, module: str, name: str, before: Callable[..., None] | None, after: Any) -> None:
        owner: Any = import_module(module)
        *outer, last = name.split(".")
        for part in outer:
            owner = getattr(owner, part)
        plain = getattr(owner, last)

        @wraps(plain)
        def hooked(*args: Any, **how: Any) -> Any:
            if before is not None:
                before(*args, **how)
            result = plain(*args, **how)
            if after is not None:
                after(*args, **how)
            return result

        setattr(owner, last, hooked)

    def _begin(self, engine: Any, batches: Any, step: int, **how: Any) -> None:
        self._step = step

    def _torn(self, point: str, args: tuple[Any, ...]) -> None:
        """A committed checkpoint is being deleted, and a part of it is gone."""
        folder = Path(args[0])
        if re.fullmatch(r"step_\d{8}", folder.name):
            min(folder.iterdir()).unlink()
            self._reach(point, args)

    def _reach(self, point: str, args: tuple[Any, ...]) -> None:
        for number, fault in enumerate(self._faults):
            by_root = POINTS[point].root or fault.victim == LAUNCHER
            actor = 0 if by_root else fault.victim
            if (fault.point, fault.step, actor) != (point, self._step, self._rank):
                continue
            try:
                # A restarted run comes by here again.
                (self._folder / f"done_{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            if fault.text:
                from torch import OutOfMemoryError

                raise OutOfMemoryError(fault.text)
            os.kill(self._process(fault.victim), fault.signal)
            if fault.victim == LAUNCHER:
                # The others wait for this rank meanwhile: what it hands on finds all at the point.
                time.sleep(1.0)

    def _process(self, victim: int) -> int:
        if victim == LAUNCHER:
            return os.getppid()
        return int((self._folder / f"rank_{victim}.pid").read_text())


def done(folder: Path) -> int:
    """How many faults have happened."""
    return len(list(folder.glob("done_*")))


def write_plan(folder: Path, faults: Sequence[Fault]) -> Path:
    """Write ``faults`` where a launched program finds them; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps([asdict(fault) for fault in faults]))
    return plan


def codes(folder: Path) -> list[int]:
    """The last exit code of each rank of a launched program that left one, by rank."""
    return [int(path.read_text()) for path in sorted(folder.glob("rank_*.code"))]


def _launched(argv: Sequence[str]) -> int:
    # Its ways into Megatron are laid before anything imports Megatron.
    import moe_train.testing.preload  # noqa: F401

    plan, *overrides = argv
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faults = [Fault(**fault) for fault in json.loads(Path(plan).read_text())]
    folder = Path(plan).parent
    code = faulty(rank, world, overrides, str(folder), faults)
    (folder / f"rank_{rank}.code").write_text(str(code))
    return code


if __name__ == "__main__":
    sys.exit(_launched(sys.argv[1:]))
