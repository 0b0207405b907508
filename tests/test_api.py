"""The Python API: every name resolves, and importing the package imports no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moe_train
from moe_train import cli
from moe_train.errors import ConfigFaults
from moe_train.run.main import main
from moe_train.testing.compare import compare
from moe_train.testing.layouts import EP2, SINGLE, SMALL
from moe_train.testing.runs import train_run
from moe_train.train.callback import Callback, StepEvent


def test_names_resolve() -> None:
    for name in moe_train.__all__:
        assert getattr(moe_train, name) is not None, name
    assert moe_train.Callback is Callback
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = moe_train.missing


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, moe_train; config = moe_train.load_config(['experiment=single']);"
        "plan = moe_train.plan(['experiment=single'], world=1);"
        "assert plan['fits'] and plan['layout']['tag'] == 'single' and config.model.layers > 0;"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_faults_are_raised_together() -> None:
    with pytest.raises(ConfigFaults, match="2 config errors"):
        moe_train.plan(["parallel=tp2_pp4_ep8", "optim.lr=-1"], world=8)


@pytest.mark.parametrize("run", [cli.main, main])
def test_version(run: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(run) and run(["--version"]) == 0
    assert capsys.readouterr().out == f"moe_train {moe_train.__version__}\n"


class Losses(moe_train.Callback):
    """The example of `moe_train.testing`."""

    def on_step(self, event: StepEvent) -> None:
        print(event.step, event.record["loss"])


@pytest.mark.world
def test_a_users_test_of_a_callback_and_of_a_layout(tmp_path: Path) -> None:
    two = [*SMALL, *EP2.overrides, "train.steps=2"]
    run = train_run(tmp_path / "run", two, 2, callbacks=[Losses()])
    assert run.codes == [0, 0]
    printed = (tmp_path / "run.log").read_text()
    assert printed.count(f"2 {run.steps[-1]['loss']}") == 2, "every rank has its own copy"
    single = train_run(tmp_path / "single", [*SMALL, *SINGLE.overrides, "train.steps=2"])
    difference = compare(run, single)
    assert difference.within() and difference.moved == [0, 0], str(difference)
