"""Per-operator overhead of a step, fitted to steps of tiny models.

Eager operators cost their launch however small their tensors are. A step of L layers, E experts
and M micro-batches is fitted by

    M (a + 3 L (l + E e))

with l per layer, e per expert, a per micro-batch; 3 because a backward pass does everything twice.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch

from moe_train.backend.groups import close_world, open_groups, open_world
from moe_train.backend.select import select_backend
from moe_train.measure.calibrate.kernels import relative_fit
from moe_train.planner.resolution import resolve_run

VOCABULARY, SEQUENCE = 64, 64
TINY = [
    "device=cpu", "experiment=twin", "parallel=single", "recompute=none", "model.hidden=32",
    "model.heads=4", "model.head_dim=8", "model.expert_hidden=16", f"data.sequence={SEQUENCE}",
]  # fmt: skip
SHAPES = [(8, 8, 4), (8, 64, 4), (4, 64, 8), (2, 8, 4), (2, 64, 4), (2, 8, 12)]
"""Layers, experts, micro-batches; the deepest first, since Megatron's tracker of auxiliary losses
keeps the size that it begins with."""
STEPS = 8


class Overheads(NamedTuple):
    """Seconds of a forward pass; a backward pass has them twice."""

    layer: float
    expert: float
    microbatch: float
    """Forward and backward together, outside the layers, optimizer's share included."""


def measure() -> Overheads:
    """Run tiny models in this process and fit :class:`Overheads` to their steps."""
    rows, wanted = [], []
    for layers, experts, count in SHAPES:
        rows.append([3 * count * layers, 3 * count * layers * experts, count])
        wanted.append(_step_seconds(layers, experts, count))
    return Overheads(*relative_fit(rows, wanted))


def _step_seconds(layers: int, experts: int, count: int) -> float:
    """Median step of one tiny model on this process."""
    sizes = [f"model.layers={layers}", f"model.experts={experts}", f"batch.global={count}"]
    run = resolve_run([*TINY, *sizes], 1)
    config = run.config
    backend = select_backend(config.device, config.backend)
    backend.prepare()
    from moe_train.train.engine import build_engine
    from moe_train.train.step import require_finite, train_step

    open_world(backend, 0, 1, 60)
    try:
        groups = open_groups(run.layout, timeout_seconds=60)
        engine = build_engine(run.with_vocabulary(VOCABULARY, "test"), backend, groups)
        batch = {
            "tokens": torch.randint(0, VOCABULARY, (1, SEQUENCE)),
            "labels": torch.randint(0, VOCABULARY, (1, SEQUENCE)),
            "loss_mask": torch.ones(1, SEQUENCE),
            "position_ids": torch.arange(SEQUENCE)[None],
        }
        seconds = []
        for step in range(1, STEPS + 1):
            begun = time.perf_counter()
            require_finite(step, train_step(engine, [batch] * count, step))
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds[2:])
    finally:
        close_world()
