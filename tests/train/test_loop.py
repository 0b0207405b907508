"""The training loop on one process without a model: what becomes of saves."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from moe_train.train import loop
from moe_train.train.callback import Callback, CallbackList, SaveEvent
from tests.support import events


class SlowSaver:
    """Saves that are never written when somebody looks, so that each commit has to wait."""

    written = False

    def __init__(self) -> None:
        self._step = 0

    @property
    def pending(self) -> bool:
        return self._step > 0

    def begin(self, step: int) -> None:
        assert not self.pending
        self._step = step

    def finish(self) -> SaveEvent | None:
        step, self._step = self._step, 0
        return SaveEvent(step, float(step), Path()) if step else None


class Saves(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, event: SaveEvent) -> None:
        self.steps.append(event.step)


def test_every_commit_is_reported_where_writes_are_slower_than_the_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = SimpleNamespace(applied=True)
    monkeypatch.setattr(loop, "train_step", lambda *_: result)
    monkeypatch.setattr(loop, "step_record", lambda *_, **__: {})
    flags = loop.ControlFlags(peak_memory=0, stop=False, written=False)
    monkeypatch.setattr(loop, "sync_control_flags", lambda *_: flags)
    watchdog, budget, unused = MagicMock(), MagicMock(), MagicMock()
    watchdog.phase.return_value = budget.measure.return_value = nullcontext()
    unused.tracer.trace.return_value = nullcontext()
    saver: Any = SlowSaver()
    saves = Saves()
    with CallbackList([saves]) as callbacks:
        callbacks.start(events.start())
        loop.run_loop(
            unused,
            unused,
            unused,
            start=0,
            intervals=loop.Intervals(steps=7, validate=0, save=2),
            work=unused,
            unigram_entropy=None,
            callbacks=callbacks,
            saver=saver,
            signals=unused,
            watchdog=watchdog,
            budget=budget,
            non_finite=unused,
        )
    assert saves.steps == [2, 4, 6, 7]
    assert [call.args for call in budget.check.call_args_list] == [(2.0,), (4.0,), (6.0,), (7.0,)]
