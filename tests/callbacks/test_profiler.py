"""train.profile_steps: which steps are profiled, on which devices, and what is reported."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from moe_train.callbacks.trace import TorchProfiler, activities
from moe_train.train.callback import CallbackList
from tests.support import events

CPU = torch.device("cpu")
FILE = "profile_rank_0.json"


@pytest.mark.parametrize("steps", [0, 2, 3])
def test_a_run_too_short_for_a_profile_is_warned_of(
    steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with CallbackList([TorchProfiler(2, tmp_path, CPU)]) as callbacks:
        callbacks.start(events.start())
        for step in range(1, steps + 1):
            callbacks.notify(events.step(step))
    written = steps > 2
    assert (tmp_path / FILE).exists() is written
    assert ("no profile was written" in caplog.text) is not written


def test_kernels_are_recorded_of_the_runs_device_alone() -> None:
    names = [[one.name for one in activities(torch.device(kind))] for kind in ("cpu", "cuda:1")]
    assert names == [["CPU"], ["CPU", "CUDA"]]


def test_a_profiler_that_cannot_start_is_not_stopped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = mock.patch.object(torch.profiler, "profile", side_effect=RuntimeError("no profiler"))
    with broken, CallbackList([TorchProfiler(1, tmp_path, CPU)]) as callbacks:
        callbacks.start(events.start())
        callbacks.notify(events.step(1))
    assert "failed in on_start" in caplog.text
    assert "failed in on_end" not in caplog.text
