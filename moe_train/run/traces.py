"""Brings the ranks' spans of a traced step together (``train.trace=true``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from moe_train.callbacks.trace import RankTrace, write_trace

if TYPE_CHECKING:
    from moe_train.run.opening import Session

WARM = 2
"""Which step after a start is traced: in the first one, much happens for the first time."""


def plan_trace(session: Session, start: int) -> None:
    """Choose the step to trace; the last one where there is no second."""
    config = session.config.train
    if config.trace:
        session.engine.tracer.planned = min(start + WARM, config.steps)


class TraceListener:
    """Listener that passes everything on and writes ``trace.json`` after the traced step.

    Every rank has one: gathering the spans takes all of them.
    """

    def __init__(self, listener: Any, session: Session) -> None:
        self._listener, self._session = listener, session

    def on_step(self, record: dict[str, Any], result: Any) -> None:
        """A training step is done."""
        tracer = self._session.engine.tracer
        if tracer.step == record["step"]:
            _write(self._session, record)
            tracer.step, tracer.events = None, []
        self._listener.on_step(record, result)

    def on_validation(self, record: dict[str, Any]) -> None:
        """A validation is done."""
        self._listener.on_validation(record)


def _write(session: Session, record: dict[str, Any]) -> None:
    tracer, folder = session.engine.tracer, session.folder
    assert folder is not None
    ours = RankTrace(session.rank, tracer.stage, tracer.events)
    everyone: list[Any] | None = [None] * session.world if session.rank == 0 else None
    dist.gather_object(ours, everyone)
    if everyone is not None:
        facts = {"layout": session.layout.tag, "step": record["step"], "run": folder.path.name}
        write_trace(folder.trace, everyone, facts)
