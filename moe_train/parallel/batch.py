"""How many micro-batches and sequences an optimizer step has in a layout."""

from __future__ import annotations

from moe_train.config.root import Config


def microbatches_per_step(config: Config, data: int) -> int:
    """Micro-batches per replica and optimizer step, all in one pipeline flush.

    `data` is the data-parallel size. ``batch.global`` (sequences), when set, decides;
    its divisibility is `moe_train.planner.legality`'s to check.
    """
    if config.batch.global_ is not None:
        return config.batch.global_ // (config.batch.micro * data)
    return config.batch.microbatches * config.batch.accumulation


def sequences_per_step(config: Config, data: int) -> int:
    """Sequences per optimizer step over all `data` replicas."""
    return microbatches_per_step(config, data) * config.batch.micro * data
