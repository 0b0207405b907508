"""How many of our own frames stand between train.py and the model's forward pass."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import FrameType

import pytest

from moe_train.testing.world import run_world
from tests.support.survival import FAULTY

ROOT = Path(__file__).resolve().parents[2]
MOST = 6
"""train.py, main, train, run_loop, train_step, forward_step."""


class Reached(BaseException):
    """The forward pass of the first step has begun."""


def _stack(rank: int, world: int, overrides: list[str]) -> list[str]:
    """Our functions from train.py's module to forward_step, in the order of calls."""
    import moe_train.train.step as step

    names: list[str] = []

    def forward_step(*_: object) -> None:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            ours = path == Path(__file__) or path.is_relative_to(ROOT / "moe_train")
            if ours or path == ROOT / "train.py":
                names.insert(0, frame.f_code.co_name)
            if path == ROOT / "train.py":
                break
            frame = frame.f_back
        raise Reached

    step.forward_step = forward_step  # type: ignore[assignment]
    sys.argv = ["train.py", *overrides]
    with pytest.raises(Reached):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return names


@pytest.mark.world
def test_frames_from_the_entry_to_the_forward_pass(tmp_path: Path) -> None:
    overrides = [*FAULTY, "device=cpu", "train.steps=1", f"run.dir={tmp_path}"]
    [names] = run_world(_stack, 1, overrides, log=tmp_path / "log")
    assert names[0] == "<module>" and names[-1] == "forward_step"
    assert len(names) <= MOST, " -> ".join(names)
