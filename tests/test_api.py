"""The Python API: every name resolves, and importing the package imports no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import moe_train
from moe_train import cli
from moe_train.errors import ConfigFaults
from moe_train.run.main import main
from moe_train.train.callback import Callback


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
    with pytest.raises(ConfigFaults, match="2 config faults"):
        moe_train.plan(["parallel=tp2_pp4_ep8", "optim.lr=-1"], world=8)


@pytest.mark.parametrize("run", [cli.main, main])
def test_version(run: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(run) and run(["--version"]) == 0
    assert capsys.readouterr().out == f"moe_train {moe_train.__version__}\n"
