"""Metrics of a training step: the fields of its line in metrics.jsonl.

To add a metric, add it to :func:`step_record`: metrics.jsonl, W&B and callbacks have it then. The
console shows those that ``callbacks/progress.py`` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_train.parallel.flops import mfu
from moe_train.planner.estimate import peak_flops

if TYPE_CHECKING:
    from moe_train.config.root import Config
    from moe_train.train.step import StepResult


@dataclass(frozen=True)
class StepWork:
    """What every step of a run computes, on which devices."""

    tokens: int
    """Tokens of a global batch."""
    flops_per_token: float
    """Of the model, forward and backward."""
    peak_flops: float
    """FLOP/s of all devices together; 0 where unknown."""


def device_peak(config: Config) -> float:
    """Peak FLOP/s of one device, for MFU; 0 where the hardware profile is not the device's."""
    hardware = config.hardware
    own = hardware.peak_known and (hardware.kind == "cpu") == (config.device == "cpu")
    return peak_flops(config) if own else 0.0


def step_record(
    step: int,
    result: StepResult,
    *,
    seconds: float,
    consumed_samples: int,
    peak_memory_bytes: int,
    work: StepWork,
    config: Config,
) -> dict[str, Any]:
    """The metrics of one step.

    Args:
        seconds: wall time of the step on this rank.
        consumed_samples: the data cursor after the step, in samples of all replicas.
        peak_memory_bytes: the largest of all ranks.
    """
    routing = result.routing
    tokens_per_second = work.tokens / seconds
    record = {
        "step": step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "consumed_samples": consumed_samples,
        "consumed_tokens": consumed_samples * config.data.sequence,
        "step_seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "mfu": mfu(tokens_per_second, work.flops_per_token, work.peak_flops),
        "peak_memory_bytes": peak_memory_bytes,
        "load_imbalance": routing.load_imbalance,
        "dropped_tokens": routing.dropped,
        "aux_loss": routing.aux_loss,
        "z_loss": routing.z_loss,
    }
    if config.model.router.force_balance:
        record["force_balance"] = True
    if not result.applied:
        record["skipped"] = True
    return record
