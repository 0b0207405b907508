"""Events of a run for callbacks under test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train.config.root import Config
from moe_train.config.training import TrainConfig
from moe_train.parallel.layout import Layout
from moe_train.parallel.resolved import ResolvedRun
from moe_train.train.callback import (
    Callback,
    EndEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
    ValidationEvent,
)


def start(step: int = 0, steps: int = 4, folder: Path = Path("run")) -> StartEvent:
    """The start of a run on one rank."""
    config = Config(train=TrainConfig(steps=steps))
    run = ResolvedRun(config, Layout(1), 256, "made up")
    return StartEvent(step, 0, run, folder)


def step(number: int, result: Any = None, **record: Any) -> StepEvent:
    """The end of a step with the metrics ``record``."""
    return StepEvent(number, {"step": number, "loss": 1.0, "step_seconds": 2.0} | record, result)


def play(
    callback: Callback,
    records: Sequence[Mapping[str, Any]],
    *,
    first: StartEvent | None = None,
    error: BaseException | None = None,
) -> None:
    """Call the hooks as a run would that gives these records of metrics.jsonl."""
    callback.on_start(first or start())
    for record in records:
        if "loss" in record:
            callback.on_step(StepEvent(record["step"], record, result=None))  # type: ignore[arg-type]
        else:
            callback.on_validation(ValidationEvent(record["step"], record))
    callback.on_save(SaveEvent(records[-1]["step"], 1.0, Path("step")))
    callback.on_end(EndEvent(error))
