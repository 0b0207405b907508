"""The callback protocol: hooks of a training run, what each may see, how failures are handled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from moe_train.errors import MoeTrainError, Preempted

if TYPE_CHECKING:
    from moe_train.parallel.resolved import ResolvedRun
    from moe_train.train.step import StepResult

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartEvent:
    """Model, optimizer and data are ready; the next step is ``step + 1``.

    Attributes:
        step: completed optimizer steps: 0, or those of the checkpoint that was loaded.
        run: configuration, layout and sizes; frozen, and equal on all ranks.
        folder: the run folder, shared by all ranks.
    """

    step: int
    rank: int
    run: ResolvedRun
    folder: Path

    @property
    def steps(self) -> int:
        """The run's last step."""
        return self.run.config.train.steps


@dataclass(frozen=True)
class StepEvent:
    """A training step is done, or was skipped (``result.applied`` is then False).

    Attributes:
        record: the step's line of metrics.jsonl (see :mod:`moe_train.train.metrics`), the same on
            all ranks but for times.
        result: loss, gradient norm, learning rate, and in ``routing`` the tokens of every expert.
    """

    step: int
    record: Mapping[str, Any]
    result: StepResult


@dataclass(frozen=True)
class ValidationEvent:
    """A validation is done.

    Attributes:
        record: ``step``, ``valid_loss`` (nats per token) and, on rank 0, ``unigram_entropy``.
    """

    step: int
    record: Mapping[str, Any]


@dataclass(frozen=True)
class SaveEvent:
    """A checkpoint is committed: complete and on the disk.

    Attributes:
        step: the step whose state it holds; an asynchronous save is reported some steps later.
        seconds: from the save's beginning, without the time in which nobody worked on it.
        folder: of the checkpoint.
    """

    step: int
    seconds: float
    folder: Path


@dataclass(frozen=True)
class RollbackEvent:
    """The run went back to ``step`` (``train.non_finite=rollback``); later steps come again."""

    step: int


@dataclass(frozen=True)
class EndEvent:
    """The run is over; ``error`` is what ended it before its last step, or None."""

    error: BaseException | None

    @property
    def state(self) -> str:
        """finished | preempted | failed."""
        if self.error is None:
            return "finished"
        return "preempted" if isinstance(self.error, Preempted) else "failed"


class Callback:
    """Base class of callbacks: override the hooks that you need.

    A run's callbacks are called in the order of their list, between steps, in the training
    thread, on every rank that has them in its list: a caller's own on all ranks, of the built-in
    ones (:func:`moe_train.run.training.build_callbacks`) most on rank 0 alone.

    A callback only observes: events are read-only, and it can neither stop nor fail the run. An
    exception is a warning, with its traceback in the rank's log file, and the callback is switched
    off: from then on only its ``on_end`` is called. So it must call no collective, in which other
    ranks would wait for it. Only errors of :mod:`moe_train.errors` end the run, as does any
    exception of a callback with ``required = True``.
    """

    required: bool = False
    """Whether the run fails with this callback."""

    def on_start(self, event: StartEvent) -> None:
        """Once, before the first step."""

    def on_step(self, event: StepEvent) -> None:
        """After every step."""

    def on_validation(self, event: ValidationEvent) -> None:
        """After every validation."""

    def on_save(self, event: SaveEvent) -> None:
        """After every commit of a checkpoint."""

    def on_rollback(self, event: RollbackEvent) -> None:
        """After every rollback."""

    def on_end(self, event: EndEvent) -> None:
        """Once after ``on_start``, also when that or the run failed: release what you opened."""


HOOKS = {
    StartEvent: "on_start",
    StepEvent: "on_step",
    ValidationEvent: "on_validation",
    SaveEvent: "on_save",
    RollbackEvent: "on_rollback",
    EndEvent: "on_end",
}
"""The hook that gets each kind of event."""


class CallbackList:
    """Calls a run's callbacks under the rules of :class:`Callback`.

    A context manager, at whose end all are ended that were started, whatever happens to others;
    the first error of a required one is raised, unless the run has failed already.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks, self._started = list(callbacks), list[Callback]()
        self._failed: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        errors = []
        for callback in self._started:
            try:
                self._call(callback, EndEvent(error))
            # Raised below, when all have released what they opened.
            except Exception as failure:  # noqa: BLE001
                errors.append(failure)
        if errors and error is None:
            raise errors[0]

    def start(self, event: StartEvent) -> None:
        """Start each in turn."""
        for callback in self._callbacks:
            self._started.append(callback)
            self._call(callback, event)

    def notify(self, event: StepEvent | ValidationEvent | SaveEvent | RollbackEvent) -> None:
        """Call the hook for ``event`` of every callback that is not switched off."""
        for callback in self._started:
            if id(callback) not in self._failed:
                self._call(callback, event)

    def _call(self, callback: Callback, event: Any) -> None:
        hook = HOOKS[type(event)]
        try:
            getattr(callback, hook)(event)
        except MoeTrainError:
            raise
        # An observer's mistake costs its own output and nothing else.
        except Exception as error:
            if callback.required:
                raise
            self._failed.add(id(callback))
            # A warning is one line on rank 0's console; log files add the traceback on every rank.
            LOGGER.warning(
                "callback %s failed in %s and is switched off; training continues: %s",
                type(callback).__name__,
                hook,
                f"{type(error).__name__}: {error}".splitlines()[0],
                exc_info=True,
            )
