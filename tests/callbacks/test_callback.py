"""The callback protocol: order, failures of observers, and a caller's own callbacks in a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from moe_train import Callback
from moe_train.errors import DataError, Preempted
from moe_train.run_folder.metrics import read
from moe_train.testing.runs import QUIET, train_run
from moe_train.testing.world import run_world
from moe_train.train.callback import CallbackList, EndEvent
from tests.support import events
from tests.support.survival import FAULTY


class Log(Callback):
    """Notes each hook that is called, and raises in one of them."""

    def __init__(
        self, name: str, calls: list[str], fails_in: str = "", error: Exception | None = None
    ) -> None:
        self._name, self._calls = name, calls
        self._fails_in, self._error = fails_in, error or ZeroDivisionError("a mistake")

    def _note(self, hook: str) -> None:
        self._calls.append(f"{self._name} {hook}")
        if hook == self._fails_in:
            raise self._error

    def on_start(self, event: Any) -> None:
        self._note("start")

    def on_step(self, event: Any) -> None:
        self._note("step")

    def on_rollback(self, event: Any) -> None:
        self._note("rollback")

    def on_end(self, event: Any) -> None:
        self._note(f"end {event.state}")


class Required(Log):
    required = True


def play(callbacks: Sequence[Callback], steps: int = 2) -> None:
    with CallbackList(callbacks) as listed:
        listed.start(events.start())
        for step in range(1, steps + 1):
            listed.notify(events.step(step))


def test_an_observer_that_fails_is_logged_once_and_switched_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[str] = []
    play([Log("a", calls, "step"), Log("b", calls)], steps=3)
    assert calls == [
        *("a start", "b start", "a step", "b step", "b step", "b step"),
        *("a end finished", "b end finished"),
    ]
    [record] = caplog.records
    assert record.levelno == logging.WARNING and record.exc_info is not None
    assert record.getMessage() == (
        "callback Log failed in on_step and is switched off; training continues: "
        "ZeroDivisionError: a mistake"
    )


@pytest.mark.parametrize(
    "failing",
    [
        lambda calls: Log("a", calls, "step", DataError("field", "problem")),
        lambda calls: Required("a", calls, "step", ZeroDivisionError()),
    ],
    ids=["an error of the family", "a required callback"],
)
def test_what_ends_the_run_ends_all_callbacks(failing: Any) -> None:
    calls: list[str] = []
    with pytest.raises((DataError, ZeroDivisionError)):
        play([failing(calls), Log("b", calls)])
    assert calls == ["a start", "b start", "a step", "a end failed", "b end failed"]


def test_only_what_was_started_is_ended() -> None:
    calls: list[str] = []
    with pytest.raises(ZeroDivisionError):
        play([Required("a", calls, "start"), Log("b", calls)])
    assert calls == ["a start", "a end failed"]


def test_a_required_callback_may_fail_at_the_end_when_all_have_ended() -> None:
    calls: list[str] = []
    with pytest.raises(ZeroDivisionError):
        play([Required("a", calls, "end finished"), Log("b", calls)], steps=0)
    assert calls[-1] == "b end finished"
    # What ended the run is not hidden by it.
    with (
        pytest.raises(KeyboardInterrupt),
        CallbackList([Required("a", calls, "end failed")]) as listed,
    ):
        listed.start(events.start())
        raise KeyboardInterrupt


def test_events_are_read_only_and_say_how_a_run_ended() -> None:
    with pytest.raises(FrozenInstanceError):
        events.step(1).step = 2  # type: ignore[misc]
    assert EndEvent(None).state == "finished"
    assert EndEvent(Preempted("step 3", "stop")).state == "preempted"
    assert EndEvent(ZeroDivisionError()).state == "failed"


class Own(Callback):
    """A caller's callback, which writes what it saw and then fails."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._seen: list[Any] = []

    def on_start(self, event: Any) -> None:
        self._seen.append(["start", event.step, event.steps, event.rank, event.run.layout.tag])
        self._path = event.folder / f"own_{event.rank}.json"

    def on_step(self, event: Any) -> None:
        tokens = event.result.routing.tokens_LE.sum(dim=1).tolist()
        self._seen.append(["step", event.step, event.record["loss"], tokens])

    def on_validation(self, event: Any) -> None:
        self._seen.append(["validation", event.step, event.record["valid_loss"]])

    def on_save(self, event: Any) -> None:
        self._seen.append(["save", event.step, event.folder.name])

    def on_end(self, event: Any) -> None:
        status = json.loads(self._path.with_name("status.json").read_text())["state"]
        self._path.write_text(json.dumps([*self._seen, ["end", event.state, status]]))
        raise ZeroDivisionError


class Failing(Callback):
    def on_step(self, event: Any) -> None:
        raise ZeroDivisionError("a mistake of the caller")


def _train(rank: int, world: int, overrides: Sequence[str]) -> int:
    from moe_train.run.main import main

    return main(overrides, callbacks=[Failing(), Own(rank)])


@pytest.mark.world
def test_a_callers_callbacks_see_the_run_and_change_nothing(tmp_path: Path) -> None:
    overrides = [*FAULTY, "train.steps=3", "train.eval_every=3", "checkpoint.every=3"]
    arguments = [*QUIET, *overrides, "parallel.pipeline=2", f"run.dir={tmp_path}", "run.name=own"]
    arguments.append("train.profile_steps=1")
    log = tmp_path / "log"
    assert run_world(_train, 2, arguments, log=log) == [0, 0], log.read_text()
    assert log.read_text().count("callback Failing failed in on_step") == 1
    assert log.read_text().count("ZeroDivisionError: a mistake of the caller\n") == 1
    assert "Traceback" not in log.read_text()
    for rank in range(2):
        text = (tmp_path / "own" / "logs" / f"rank_{rank}.log").read_text()
        assert 'raise ZeroDivisionError("a mistake of the caller")' in text
    records = read(tmp_path / "own" / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    [valid] = [record["valid_loss"] for record in records if "valid_loss" in record]
    for rank in range(2):
        seen = json.loads((tmp_path / "own" / f"own_{rank}.json").read_text())
        assert [entry[0] for entry in seen] == [
            *("start", "step", "step", "step", "validation", "save", "end"),
        ]
        assert seen[0][1:4] == [0, 3, rank]
        assert [entry[2] for entry in seen[1:4]] == losses
        assert seen[4] == ["validation", 3, valid]
        assert seen[5] == ["save", 3, "step_00000003"]
        assert seen[6][:2] == ["end", "finished"]
        # Rank 0 writes the final status when its callbacks have ended; rank 1 may end later.
        assert rank or seen[6][2] == "running"
        profile = json.loads((tmp_path / "own" / "logs" / f"profile_rank_{rank}.json").read_text())
        names = {event["name"] for event in profile["traceEvents"]}
        assert {"F0", "optimizer", "ProfilerStep#2"} <= names
    assert json.loads((tmp_path / "own" / "status.json").read_text())["state"] == "finished"
    plain = train_run(tmp_path / "plain", [*overrides, "parallel.pipeline=2"], 2)
    assert plain.column("loss") == losses
