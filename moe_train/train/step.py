"""One training step and one validation, as functions of an Engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from moe_train.errors import NonFiniteError
from moe_train.train.engine import Engine
from moe_train.train.forward import MicroBatch, forward_step
from moe_train.train.lr_schedule import set_step
from moe_train.train.router_stats import RoutingStats


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank."""

    loss: float
    """Mean token loss over the global batch, nats."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    lr: float
    routing: RoutingStats
    applied: bool = True
    """Whether the weights were updated: not where the loss or the gradient norm is not finite."""


def train_step(engine: Engine, batches: Sequence[MicroBatch], step: int) -> StepResult:
    """Forward and backward over all micro-batches, then the optimizer if the step is finite.

    Args:
        batches: this replica's micro-batches, ``engine.run.microbatches`` of them.
        step: 1-based number of this step.

    Returns:
        The same on every rank; with ``applied`` False, and no weight or expert bias changed on
        any rank, where the loss or the gradient norm is not finite.
    """
    for chunk in engine.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    engine.routing.clear()
    # Megatron's finalize_model_grads moves the expert bias inside the schedule, before the
    # gradients are known to be finite.
    before = [(state, state.clone()) for state in router_state(engine)]
    losses = engine.forward_backward(**schedule_arguments(engine, batches))
    engine.optimizer.prepare_grads()
    # Over all ranks, each parameter once (Megatron leaves out replicas over TP, and sums experts
    # over their own groups). torch's kernels: backend/torch_kernels/gradient_norm.py.
    grad_norm = float(engine.optimizer.get_grad_norm())
    loss, routing = reduce_step_stats(engine, losses, len(batches))
    lr = set_step(engine.scheduler, step)
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:
        with engine.tracer.region("optimizer", "optimizer"):
            apply_update(engine.optimizer, grad_norm)
    else:
        for state, value in before:
            state.copy_(value)
    return StepResult(loss, grad_norm, lr, routing, finite)


def router_state(engine: Engine) -> list[torch.Tensor]:
    """This rank's tensors of the balancing methods in effect, which no gradient updates."""
    methods = engine.config.model.router.balancing_methods
    if not (names := {name for method in methods for name in method.state}):
        return []
    return [
        buffer
        for chunk in engine.chunks
        for name, buffer in chunk.named_buffers()
        if name.rpartition(".")[2] in names
    ]


def require_finite(
    step: int, result: StepResult, consequence: str = "no weight was changed"
) -> StepResult:
    """The result of ``step``, whose update has to have been applied.

    Raises:
        NonFiniteError: it was not; the same on all ranks.
    """
    if result.applied:
        return result
    raise NonFiniteError(
        f"step {step}",
        f"loss is {result.loss}, gradient norm is {result.grad_norm}; {consequence}",
        "resume from the last checkpoint with a lower optim.lr or other data",
    )


def apply_update(optimizer: Any, grad_norm: float) -> None:
    """Clip the prepared gradients by their global norm and update the weights."""
    clip_gradients(optimizer, grad_norm)
    optimizer.step_with_ready_grads()


@torch.no_grad()
def validate(engine: Engine, steps: Sequence[Sequence[MicroBatch]]) -> float:
    """Mean token loss over ``steps`` global batches, nats, the same on every rank."""
    for chunk in engine.chunks:
        chunk.eval()
    total = 0.0
    for batches in steps:
        losses = engine.forward_backward(**schedule_arguments(engine, batches, forward_only=True))
        total += reduce_step_stats(engine, losses, len(batches))[0]
    for chunk in engine.chunks:
        chunk.train()
    return total / len(steps)


def schedule_arguments(
    engine: Engine, batches: Sequence[MicroBatch], *, forward_only: bool = False
) -> dict[str, Any]:
    """The keyword arguments of Megatron's forward-backward function for these micro-batches."""
    chunks = list(engine.chunks)
    # Each virtual stage walks the same micro-batches at its own pace.
    iterators = [iter(batches) for _ in chunks]
    step = partial(forward_step, engine.groups, engine.backend.device)
    return {
        "forward_step_func": engine.tracer.passes(step, chunks),
        "data_iterator": iterators if len(chunks) > 1 else iterators[0],
        "model": chunks,
        "num_microbatches": len(batches),
        "seq_length": engine.config.data.sequence,
        "micro_batch_size": engine.config.batch.micro,
        "forward_only": forward_only,
    }


def reduce_step_stats(
    engine: Engine, losses: list[Any], microbatches: int
) -> tuple[float, RoutingStats]:
    """Sum loss and routing counts over the world in one all-reduce.

    Args:
        losses: what the schedule returned on this rank, a mapping with ``loss`` a micro-batch.
        microbatches: of each replica.

    Returns:
        Mean token loss (nats) and routing totals, the same on every rank. The loss is the mean of
        all replicas' micro-batches, each the mean of its tokens.
    """
    data_size = engine.groups.dp.size()
    loss = torch.zeros(1, dtype=torch.float64)
    if engine.counts_loss:
        loss += torch.stack([entry["loss"] for entry in losses]).double().sum().cpu()
    vector = torch.cat([loss, engine.routing.vector(data_size)]).to(engine.backend.device)
    dist.all_reduce(vector)
    vector = vector.cpu()
    mean = float(vector[0]) / (microbatches * data_size)
    return mean, engine.routing.stats(vector[1:], microbatches)


def clip_gradients(optimizer: Any, grad_norm: float) -> None:
    """Scale all gradients by one factor, from a norm that is already known.

    Megatron's ``ChainedOptimizer.step`` does the same after computing the norm itself.
    """
    for part in optimizer.chained_optimizers:
        if part.config.clip_grad > 0.0 and (params := part.get_parameters()):
            clip_grad_by_total_norm_fp32(
                params,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
