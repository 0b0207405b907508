"""Every check, in the order of importance.

machine: environment. numbers: weights, curves, checkpoints. kernels: throughput. speed: step time.
limits: memory. survival: kills. layouts: several GPUs. reference_30b: eight GPUs.
"""

from __future__ import annotations

from moe_train.gpu_check.bench import Check
from moe_train.gpu_check.checks import (
    kernels,
    layouts,
    limits,
    machine,
    numbers,
    reference_30b,
    speed,
    survival,
)

CHECKS: list[Check] = [
    machine.environment,
    numbers.initial,
    numbers.FP32,
    numbers.BF16,
    # These three share an open session.
    speed.speed,
    speed.profile,
    limits.storage,
    limits.memory,
    numbers.checkpoint,
    limits.oom,
    survival.resume,
    kernels.kernels,
    numbers.te,
    numbers.fp8,
    kernels.zero_rows,
    *layouts.TWO,
    *layouts.FOUR,
    reference_30b.spanning_layout,
    reference_30b.fastest,
]
"""A killed suite has answered the first ones."""
