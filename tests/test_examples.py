"""The programs in examples/ run."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from moe_train.testing.layouts import SMALL
from moe_train.testing.runs import QUIET
from moe_train.testing.world import run_world

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_example(rank: int, world: int, name: str, arguments: list[str]) -> int:
    sys.argv = [name, *arguments]
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.world
def test_expert_load_prints_every_layer(tmp_path: Path) -> None:
    overrides = [*QUIET, *SMALL, "train.steps=2", f"run.dir={tmp_path}"]
    log = tmp_path / "log"
    assert run_world(run_example, 1, "expert_load.py", overrides, log=log) == [0]
    lines = [line for line in log.read_text().splitlines() if line.startswith("step ")]
    assert [len(line.split()) for line in lines] == [2 + 4] * 2


def test_layouts_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "compare_layouts.py"), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) == 3
