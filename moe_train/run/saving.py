"""Saves of a run: when one begins, what it holds, and when it counts."""

from __future__ import annotations

from moe_train.checkpoint.save import Save
from moe_train.data.batches import BatchSource
from moe_train.run.opening import Session


class Saver:
    """At most one checkpoint on its way; see ``checkpoint.asynchronous``.

    Args:
        source: whose cursor goes into each checkpoint.
    """

    def __init__(self, session: Session, source: BatchSource) -> None:
        self._session, self._source = session, source
        self._pending: Save | None = None

    def begin(self, step: int) -> None:
        """Take the state after ``step`` and start to write it; collective.

        Raises:
            CheckpointError: on every rank, when any rank cannot write.
        """
        self.finish()
        session, config = self._session, self._session.config
        assert session.folder is not None
        consumed = self._source.consumed
        self._pending = Save(
            session.folder.checkpoints,
            step=step,
            chunks=[chunk.module for chunk in session.engine.chunks],
            optimizer=session.engine.optimizer,
            keep=config.checkpoint.keep,
            beside=config.checkpoint.asynchronous,
            facts=session.facts()
            | {
                "consumed_samples": consumed,
                "consumed_tokens": consumed * config.data.sequence,
            },
        )

    @property
    def pending(self) -> bool:
        """Whether a save has begun that no checkpoint stands for yet; the same on all ranks."""
        return self._pending is not None

    @property
    def written(self) -> bool:
        """Whether this rank would not have to wait in :meth:`finish`."""
        return self._pending is None or self._pending.written

    def finish(self) -> float | None:
        """Wait for the save on its way and let it count; collective.

        Returns:
            Seconds that it took from its beginning, those in which nobody worked on it left out;
            None when there was none.

        Raises:
            CheckpointError: as in :meth:`begin`.
        """
        if self._pending is None:
            return None
        save, self._pending = self._pending, None
        save.commit()
        return save.seconds
