"""Learning-rate schedules, through Megatron's own scheduler."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from moe_train.config.training import OptimConfig

STYLES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "constant": "constant"}


def build_scheduler(optimizer: Any, optim: OptimConfig, steps: int) -> OptimizerParamScheduler:
    """Scheduler over ``optimizer``'s groups; ask it with :func:`set_step`.

    Args:
        steps: ``train.steps``, the default of ``optim.decay_steps``.
    """
    decay = optim.decay_steps or steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=max(decay, optim.warmup_steps + 1),
        lr_decay_style=STYLES[optim.schedule],
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=optim.wsd_decay_steps or max(1, decay // 10),
        lr_wsd_decay_style="linear",
    )


def set_step(scheduler: OptimizerParamScheduler, step: int) -> float:
    """Set every group's rate for 1-based ``step`` and return the base rate.

    The schedule has no state of its own: the same step gives the same rate after any resume.
    """
    scheduler.num_steps = step
    scheduler.step(0)
    return float(scheduler.get_lr({"max_lr": scheduler.max_lr, "min_lr": scheduler.min_lr}))
