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
    """Model, optimizer and data are ready; the next step is ``step + 1``."""

    step: int
    """Completed optimizer steps: 0, or those of the checkpoint that was loaded."""
    rank: int
    run: ResolvedRun
    """Configuration, layout and sizes; frozen, and equal on all ranks."""
    folder: Path
    """The run folder, shared by all ranks."""

    @property
    def steps(self) -> int:
        """The run's last step."""
        return self.run.config.train.steps


@dataclass(frozen=True)
class StepEvent:
    """A training step is done, or was skipped (``result.applied`` is then False)."""

    step: int
    record: Mapping[str, Any]
    """The step's line of metrics.jsonl (see :mod:`moe_train.train.metrics`), the same on all ranks
    but for times."""
    result: StepResult
    """Loss, gradient norm, learning rate, and in ``routing`` the tokens of every expert."""


@dataclass(frozen=True)
class ValidationEvent:
    """A validation is done."""

    step: int
    record: Mapping[str, Any]
    """``step``, ``valid_loss`` (nats per token) and, on rank 0, ``unigram_entropy``."""


@dataclass(frozen=True)
class SaveEvent:
    """A checkpoint is committed: whole and on the disk."""

    step: int
    """The step whose state it holds; an asynchronous save is reported some steps later."""
    seconds: float
    """From the save's beginning, without the time in which nobody worked on it."""
    folder: Path


@dataclass(frozen=True)
class EndEvent:
    """The run is over."""

    step: int
    """Completed optimizer steps."""
    error: BaseException | None
    """What ended the run before its last step; None where it is finished."""

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
    exception is logged once with its traceback, and the callback is switched off: from then on
    only its ``on_end`` is called. So it must call no collective, in which other ranks would wait
    for it. Only errors of :mod:`moe_train.errors` end the run, as does any exception of a callback
    with ``required = True``.
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

    def on_rollback(self, step: int) -> None:
        """The run went back to ``step`` (``train.non_finite=rollback``); what follows comes
        again."""

    def on_end(self, event: EndEvent) -> None:
        """Once after ``on_start``, also when that or the run failed: release what you hold."""


class CallbackList(Callback):
    """Calls several callbacks under the rules of :class:`Callback`.

    A context manager, whose end calls ``on_end`` of those whose ``on_start`` was called.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks, self._started = list(callbacks), list[Callback]()
        self._failed: set[int] = set()
        self._step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.on_end(EndEvent(self._step, error))

    def on_start(self, event: StartEvent) -> None:
        """Start each in turn."""
        self._step = event.step
        for callback in self._callbacks:
            self._started.append(callback)
            self._call(callback, "on_start", event)

    def on_step(self, event: StepEvent) -> None:
        """Pass the event on."""
        self._step = event.step
        self._call_all("on_step", event)

    def on_validation(self, event: ValidationEvent) -> None:
        """Pass the event on."""
        self._call_all("on_validation", event)

    def on_save(self, event: SaveEvent) -> None:
        """Pass the event on."""
        self._call_all("on_save", event)

    def on_rollback(self, step: int) -> None:
        """Pass the step on."""
        self._step = step
        self._call_all("on_rollback", step)

    def on_end(self, event: EndEvent) -> None:
        """End each, whatever happens to the others; raises the first error of a required one,
        unless the run has failed already."""
        errors = []
        for callback in self._started:
            try:
                self._call(callback, "on_end", event)
            # Raised below, when all have released what they hold.
            except Exception as error:  # noqa: BLE001
                errors.append(error)
        self._started = []
        if errors and event.error is None:
            raise errors[0]

    def _call_all(self, hook: str, event: object) -> None:
        for callback in self._started:
            if id(callback) not in self._failed:
                self._call(callback, hook, event)

    def _call(self, callback: Callback, hook: str, event: object) -> None:
        try:
            getattr(callback, hook)(event)
        except MoeTrainError:
            raise
        # An observer's mistake costs its own output and nothing else.
        except Exception:
            if callback.required:
                raise
            self._failed.add(id(callback))
            LOGGER.exception(
                "callback %s failed in %s and is switched off; training continues",
                type(callback).__name__,
                hook,
            )
