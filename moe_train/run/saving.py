"""Saves of a run, at most one at a time: begin, write, commit."""

from __future__ import annotations

from moe_train.checkpoint.save import Save
from moe_train.data.batches import BatchSource
from moe_train.run.opening import Session
from moe_train.train.callback import SaveEvent


class Saver:
    """Begins and commits checkpoints; see ``checkpoint.asynchronous``.

    Args:
        source: its data cursor goes into each checkpoint.
    """

    def __init__(self, session: Session, source: BatchSource) -> None:
        self._session, self._source = session, source
        self._pending: Save | None = None

    def begin(self, step: int) -> None:
        """Copy the state after ``step`` and start to write it; collective.

        An earlier save has to be finished: its event is the caller's to report.

        Raises:
            CheckpointError: on every rank, when any rank cannot write.
        """
        assert self._pending is None
        session, config = self._session, self._session.config
        assert session.folder is not None
        consumed = self._source.consumed
        self._step = step
        self._pending = Save(
            session.folder.checkpoints,
            step=step,
            chunks=session.modules,
            optimizer=session.engine.optimizer,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            fields=session.manifest_fields()
            | {
                "consumed_samples": consumed,
                "consumed_tokens": consumed * config.data.sequence,
            },
        )

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is not committed; the same on all ranks."""
        return self._pending is not None

    @property
    def written(self) -> bool:
        """Whether this rank would not have to wait in :meth:`finish`."""
        return self._pending is None or self._pending.written

    def finish(self) -> SaveEvent | None:
        """Wait for the pending save and commit it; None where there is none; collective.

        Raises:
            CheckpointError: as in :meth:`begin`.
        """
        if self._pending is None:
            return None
        save, self._pending = self._pending, None
        folder = save.commit()
        return SaveEvent(self._step, save.seconds, folder)
