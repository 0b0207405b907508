"""Checkpoints and prepared data of version 0.1 are read, and the curve goes on bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_train import cli
from moe_train.testing.runs import train_run

DATA = Path(__file__).with_name("data") / "v0_1"
CHECKPOINT = DATA / "run" / "checkpoints" / "step_00000003"
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text())
LAYOUTS = {"single": {}, "TP2.EP2": {"tensor": 2, "expert": 2}}


def test_checkpoint_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "verify", str(CHECKPOINT)]) == 0
    assert "step_00000003" in capsys.readouterr().out


@pytest.mark.world
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_steps_equal_those_of_0_1(tmp_path: Path, layout: str) -> None:
    """Resumed in the layout that wrote it (random states and all), and in another one."""
    sizes = LAYOUTS[layout]
    run = train_run(
        tmp_path / "run",
        [
            *EXPECTED["overrides"],
            *(f"parallel.{name}={size}" for name, size in sizes.items()),
            *(f"data.train=[{DATA / 'text'}]", f"data.cache={tmp_path / 'cache'}"),
            *(f"checkpoint.resume={CHECKPOINT}", "checkpoint.every=0", "train.steps=6"),
        ],
        len(sizes) or 1,
    )
    log = run.folder.with_suffix(".log").read_text()
    assert set(run.codes) == {0}, log
    assert ("written in layout TP2.EP2" in log) == (layout == "single")
    names = ("step", "loss_hex", "grad_norm_hex")
    results = [{name: record[name] for name in names} for record in run.steps]
    expected = EXPECTED["steps"][layout]
    # Another CPU sums in another order, also under the same name: kernels round otherwise, nothing
    # more. `make golden` compares a resume bit for bit, both sides on one machine.
    for ours, theirs in zip(results, expected, strict=True):
        assert ours["step"] == theirs["step"]
        for name, tolerance in (("loss_hex", 1e-6), ("grad_norm_hex", 1e-5)):
            value, reference = float.fromhex(ours[name]), float.fromhex(theirs[name])
            assert value == pytest.approx(reference, rel=tolerance), (ours["step"], name)
