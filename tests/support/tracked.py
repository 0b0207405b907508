"""One step of a real rank under the memory tracker."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

VOCAB = 500


class RealRank(NamedTuple):
    """Bytes of a rank's state, and of all its tensors at the peak."""

    weights: int
    gradients: int
    optimizer: int
    peak: int
    phase: str

    @property
    def activations(self) -> int:
        """What comes and goes, at the peak."""
        return self.peak - self.weights - self.gradients - self.optimizer


def real_rank(rank: int, world: int, words: list[str]) -> RealRank:
    """State by category, peak and its phase of one tracked step of a real engine."""
    from moe_train.checkpoint.optimizer_state import initialise_state
    from moe_train.measure.dryrun.step import own_state, watched_step
    from moe_train.measure.dryrun.tracker import GRADIENTS, OPTIMIZER, WEIGHTS, MemoryTracker
    from tests.support.engines import micro_batches, open_engine

    engine = open_engine(rank, world, words, vocab=VOCAB)
    batch = engine.config.batch.micro * engine.run.microbatches * engine.groups.dp.size()
    shape = (batch, engine.config.data.sequence + 1)
    batches = micro_batches(engine, np.random.default_rng(0).integers(0, VOCAB, shape))
    with MemoryTracker() as tracker:
        initialise_state(engine.optimizer)
        own_state(tracker, engine)
        peak = watched_step(engine, batches, tracker).peak
        state = [tracker.total(one) for one in (WEIGHTS, GRADIENTS, OPTIMIZER)]
        return RealRank(*state, peak.bytes, peak.phase)
