"""Callers that time training steps fail on a step whose update was skipped."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from moe_train.testing.world import run_world


def _benchmark() -> None:
    from benchmarks import contestants
    from benchmarks.cases import CASES
    from moe_train.train import engine

    with (
        mock.patch.object(contestants, "_opened", mock.MagicMock(return_value=[mock.Mock()] * 3)),
        mock.patch.object(contestants, "_batches"),
        mock.patch.object(engine, "build_engine"),
    ):
        contestants.ours(next(iter(CASES.values())))()


def _gpu_check() -> None:
    from moe_train.gpu_check.tasks import session

    session._open.session, session._open.source, session._open.step = mock.Mock(), mock.Mock(), 0
    session.take_step()


def _calibration() -> None:
    from moe_train.measure.calibrate import overheads

    overheads._step_seconds(1, 2, 1)


def _failures(rank: int, world: int) -> list[str]:
    from moe_train.backend.select import select_backend
    from moe_train.errors import NonFiniteError
    from moe_train.planner.resolution import resolve_run

    config = resolve_run(["device=cpu", "experiment=twin", "parallel=single"], 1).config
    select_backend(config.device, config.backend).prepare()
    from moe_train.train import step

    skipped: Any = step.StepResult(float("nan"), 1.0, 0.1, mock.Mock(), applied=False)
    result = []
    with mock.patch.object(step, "train_step", lambda *_: skipped):
        for caller in (_benchmark, _gpu_check, _calibration):
            with pytest.raises(NonFiniteError) as raised:
                caller()
            result.append(str(raised.value))
    return result


@pytest.mark.world
def test_a_skipped_update_is_not_timed() -> None:
    [messages] = run_world(_failures, 1)
    assert len(messages) == 3
    for message in messages:
        assert message.startswith(
            "step 1: loss is nan, gradient norm is 1.0; no weight was changed"
        )
