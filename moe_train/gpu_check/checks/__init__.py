"""Every check, in the order of importance."""

from __future__ import annotations

from moe_train.gpu_check.check import Check
from moe_train.gpu_check.checks import (
    kernels,
    layouts,
    limits,
    machine,
    numbers,
    reference_30b,
    speed,
)
from moe_train.gpu_check.checks import survival as survive

CHECKS: list[Check] = [
    machine.ENVIRONMENT,
    numbers.INITIAL,
    numbers.FP32,
    numbers.BF16,
    # These three share an open session.
    speed.SPEED,
    speed.PROFILE,
    limits.STORAGE,
    limits.MEMORY,
    numbers.CHECKPOINT,
    limits.OOM,
    survive.RESUME,
    kernels.KERNELS,
    numbers.TE,
    numbers.FP8,
    kernels.ZERO_ROWS,
    *layouts.TWO,
    *layouts.FOUR,
    *reference_30b.EIGHT,
]
"""A killed suite has answered the first ones."""
