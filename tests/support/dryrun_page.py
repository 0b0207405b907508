"""Page of the planner's closed form against dry runs of the 30B config, a long run.

``python -m tests.support.dryrun_page > docs/dryrun.md`` writes it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from moe_train.measure.dryrun.prepare import (
    cpu_backend,
    enough_microbatches,
    first_of_stages,
)
from moe_train.measure.dryrun.report import activation_difference, difference, planned
from moe_train.planner.memory.stages import GB
from moe_train.planner.resolution import resolve_run

STAGE = "parallel.placement=stage"
READINGS: dict[str, tuple[list[str], int]] = {
    "TP2.PP4.EP8.span": (["experiment=moe_30b_8x64gb"], 8),
    "TP2.PP4.EP2": (["experiment=moe_30b_8x64gb", STAGE, "parallel.expert=2"], 8),
    "TP2.PP4.ETP2": (
        ["experiment=moe_30b_8x64gb", STAGE, "parallel.expert=1", "parallel.expert_tensor=2"],
        8,
    ),
    "TP2.EP8": (["experiment=moe_30b_8x64gb", "parallel=tp2_ep8", STAGE], 8),
    "TP2.PP4.EP8": (["experiment=moe_30b_32x64gb"], 32),
}
"""The legal readings of EP=8, TP=2, PP=4 by layout tag: overrides and ranks."""
POLICIES = ("none", "2-15", "all")

HEAD = """# Dry run against closed form

Written by `python -m tests.support.dryrun_page > docs/dryrun.md`.

The dry run builds the real 30 B model of a rank, its gradient buffers and its optimizer state on
fake tensors and runs its schedule, forward and backward, then gradient norm, clipping and update;
the peak is that of all live tensors. The planner's closed form
(`moe_train/planner/memory/stages.py`) is for the same kernels, torch's own on the CPU, without
fragmentation. Both leave out what kernels use inside.
Routing is even, sequences have 4096 tokens, the optimizer is precision-aware (12 bytes a
parameter). Sizes are in GB, 1e9 bytes.

One rank stands for its pipeline stage: its tensor-, expert- and data-parallel peers hold tensors
of the same shapes, and rows are routed evenly. The steps here have as many micro-batches as a
schedule needs to become steady (P + 1 in 1F1B, 2 P spanning, 2 without a pipeline); more do not
change the peak. A test holds both on TP2.PP2.EP2 at a small size, up to a few single numbers.

State (weights, gradients, optimizer) is most of the memory, so the difference is given also for
what is left when it is taken away from both sides.

| layout | recompute | stage | dry run | planned | diff. | without state | diff. | the peak |
|---|---|---:|---:|---:|---:|---:|---:|---|
"""


class Row(NamedTuple):
    """One stage of the table; sizes in bytes, differences as fractions."""

    layout: str
    recompute: str
    stage: int
    dry: int
    planned: float
    difference: float
    activations: int
    activation_difference: float
    moment: str


def rows(reading: str, policy: str) -> list[Row]:
    """Every stage of a layout, by tag, under a recomputation."""
    overrides, world = READINGS[reading]
    resolved = resolve_run([*overrides, f"recompute.layers={policy}"], world)
    layout, backend = resolved.layout, cpu_backend(resolved.config)

    # Megatron's modules come only after the host is prepared for them.
    from moe_train.measure.dryrun.rank import dry_run

    results = []
    for rank in first_of_stages(layout):
        count = enough_microbatches(layout)
        run = dry_run(resolved, backend, rank, microbatches=count)
        plan = planned(resolved, run.stage, 1.0)
        results.append(
            Row(
                layout.tag, policy, run.stage, run.peak.bytes, plan.allocated,
                difference(run, plan), run.peak.bytes - run.state,
                activation_difference(run, plan), f"{run.peak.phase}, {run.peak.module}",
            )
        )  # fmt: skip
    return results


def page(workers: int) -> str:
    """The whole page, from as many processes as ``workers``; progress goes to standard error."""
    lines, worst = [], (0.0, 0.0)
    tasks = [(reading, policy) for reading in READINGS for policy in POLICIES]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(rows, *zip(*tasks, strict=True)):
            for row in result:
                lines.append(
                    f"| {row.layout} | {row.recompute} | {row.stage} | {row.dry / GB:.3f} "
                    f"| {row.planned / GB:.3f} | {row.difference:+.2%} "
                    f"| {row.activations / GB:.3f} | {row.activation_difference:+.1%} "
                    f"| {row.moment} |"
                )
                worst = (
                    max(worst[0], abs(row.difference)),
                    max(worst[1], abs(row.activation_difference)),
                )
                print(lines[-1], file=sys.stderr)
    tail = f"\nLargest difference: {worst[0]:.2%}, and {worst[1]:.1%} without state.\n"
    return HEAD + "\n".join(lines) + "\n" + tail


if __name__ == "__main__":
    sys.stdout.write(page(os.cpu_count() or 1))
