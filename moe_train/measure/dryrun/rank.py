"""The dry run of one rank: build, create optimizer state, run a step, read the peak."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_train.backend.protocol import Backend
from moe_train.checkpoint.optimizer_state import initialise_state
from moe_train.config.root import Config
from moe_train.measure.dryrun.routing import known_routing
from moe_train.measure.dryrun.step import own_state, watched_step
from moe_train.measure.dryrun.tracker import GRADIENTS, OPTIMIZER, WEIGHTS, MemoryTracker, Peak
from moe_train.measure.dryrun.world import fake_engine, fake_world
from moe_train.parallel.resolved import ResolvedRun
from moe_train.parallel.shapes import Assumptions, capacity_factor
from moe_train.train.forward import MicroBatch


@dataclass(frozen=True)
class RankRun:
    """What a rank holds, in bytes."""

    rank: int
    stage: int
    weights: int
    gradients: int
    optimizer: int
    peak: Peak
    update: int
    """Bytes that the optimizer's update needs beside what is live before it."""

    @property
    def state(self) -> int:
        """What is held all the time."""
        return self.weights + self.gradients + self.optimizer


def dry_run(
    run: ResolvedRun,
    backend: Backend,
    rank: int,
    *,
    imbalance: float = 1.0,
    microbatches: int | None = None,
    block: int = 1,
) -> RankRun:
    """Be ``rank`` for one step on fake tensors.

    Args:
        backend: whose modules and kernels are run; prepared.
        imbalance: rows of this rank's experts over the average.
        microbatches: of the step; None takes the configured number.
        block: bytes that an allocation is rounded up to.
    """
    config, layout = run.config, run.layout
    count = microbatches or run.microbatches
    tokens = config.data.sequence // layout.context * config.batch.micro // layout.tensor
    rows = tokens * config.model.experts_per_token
    factor = capacity_factor(config, Assumptions(imbalance=imbalance))
    with fake_world(rank, layout.world), known_routing(rows, factor):
        tracker = MemoryTracker(block)
        with tracker:
            engine = fake_engine(run, backend)
            initialise_state(engine.optimizer)
            own_state(tracker, engine)
            # All micro-batches are alike, and the same tensors serve for all.
            watched = watched_step(engine, [_micro_batch(config)] * count, tracker)
            return RankRun(
                rank,
                layout.coordinates(rank).dense.pp,
                tracker.total(WEIGHTS),
                tracker.total(GRADIENTS),
                tracker.total(OPTIMIZER),
                watched.peak,
                watched.update,
            )


def _micro_batch(config: Config) -> MicroBatch:
    shape = (config.batch.micro, config.data.sequence)
    integers = {
        name: torch.zeros(shape, dtype=torch.int64) for name in ("tokens", "labels", "position_ids")
    }
    return {**integers, "loss_mask": torch.ones(shape)}
