"""The order in which a pipeline stage really runs its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Event = tuple[str, int, int]
"""("F" or "B", micro-batch, model chunk)."""


@dataclass
class StageRecord:
    """One rank's step."""

    stage: int
    events: list[Event] = field(default_factory=list)
    expected: list[Event] = field(default_factory=list)
    """Megatron's own table, unrolled for this stage; empty without virtual stages."""

    @property
    def most_in_flight(self) -> int:
        """Largest number of micro-batches forwarded and not yet back-propagated, per chunk sum."""
        held, most = 0, 0
        for kind, _, _ in self.events:
            held += 1 if kind == "F" else -1
            most = max(most, held)
        return most


def record_step(rank: int, world: int, overrides: Sequence[str]) -> StageRecord:
    """Train one step on made-up tokens and write down every forward and backward pass.

    Hooks sit on the model chunks and their outputs, so that what ran is recorded, whatever
    schedule asked for it.
    """
    from moe_train.train.step import train_step
    from tests.support.engines import micro_batches, open_engine

    engine = open_engine(rank, world, overrides)
    record = StageRecord(engine.groups.pp.rank())
    for index, chunk in enumerate(engine.chunks):
        _watch(chunk, index, record.events)
    config = engine.config
    replicas = engine.groups.dp.size() * config.batch.micro
    shape = (engine.run.microbatches * replicas, config.data.sequence + 1)
    tokens = np.random.default_rng(0).integers(0, 100, shape)
    train_step(engine, micro_batches(engine, tokens), 1)
    if len(engine.chunks) > 1:
        record.expected = _table(engine)
    return record


def _watch(chunk: Any, index: int, events: list[Event]) -> None:
    seen = [0]

    def forward(module: Any, inputs: Any, output: Any) -> None:
        number = seen[0]
        seen[0] += 1
        events.append(("F", number, index))
        output.register_hook(lambda gradient: events.append(("B", number, index)))

    chunk.register_forward_hook(forward)


def _table(engine: Any) -> list[Event]:
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,
        get_schedule_table,
    )

    chunks, group = len(engine.chunks), engine.megatron.microbatch_group_size_per_vp_stage
    table = get_schedule_table(engine.run.microbatches, chunks, group)
    _, _, warmup, remaining = get_pp_rank_microbatches(engine.run.microbatches, chunks, group)
    forward = [("F", number, chunk) for number, chunk in table]
    backward = [("B", number, chunks - 1 - chunk) for number, chunk in table]
    steady = [
        event for pair in zip(forward[warmup:], backward[:remaining], strict=True) for event in pair
    ]
    return forward[:warmup] + steady + backward[remaining:]
