"""The tick-aligned 1F1B schedule that ``placement=span`` runs on (see plan/ticks.py).

It has the signature of Megatron's schedules and uses their forward and backward steps, so that
loss scaling, auxiliary-loss scaling and gradient finalisation are Megatron's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import (
    backward_step,
    deallocate_output_tensor,
    forward_step,
)

from moe_train.model.span.exchange import Span
from moe_train.plan.ticks import ticks


class Edge:
    """Sends to one neighbour and receives from the other, one message in flight each way.

    Args:
        group: the pipeline group.
        step: +1 for activations (to the next stage), -1 for gradients.
        shape, dtype, device: of a message.
    """

    def __init__(
        self, group: Any, step: int, shape: tuple[int, ...], dtype: torch.dtype, device: Any
    ) -> None:
        self._group, self._step = group, step
        self._shape, self._dtype, self._device = shape, dtype, device
        self._received: torch.Tensor | None = None
        self._pending: list[Any] = []
        self._outgoing: torch.Tensor | None = None

    def post(self, half: Mapping[int, int], outgoing: torch.Tensor | None) -> None:
        """Start this half's messages.

        Args:
            half: the active stages; what they computed goes to their neighbours.
            outgoing: this stage's message, if it was active.
        """
        self.settle()
        stage, stages = self._group.rank(), self._group.size()
        operations = []
        if stage in half and 0 <= stage + self._step < stages:
            assert outgoing is not None
            self._outgoing = outgoing.contiguous()
            peer = dist.get_global_rank(self._group, stage + self._step)
            operations.append(dist.P2POp(dist.isend, self._outgoing, peer, self._group))
        if stage - self._step in half:
            self._received = torch.empty(
                self._shape, dtype=self._dtype, device=self._device, requires_grad=True
            )
            peer = dist.get_global_rank(self._group, stage - self._step)
            operations.append(dist.P2POp(dist.irecv, self._received.detach(), peer, self._group))
        if operations:
            self._pending = dist.batch_isend_irecv(operations)

    def take(self) -> torch.Tensor | None:
        """The message of the neighbour's last half, or None at the end of the pipeline."""
        self.settle()
        received, self._received = self._received, None
        return received

    def settle(self) -> None:
        """Wait for the messages in flight."""
        for work in self._pending:
            work.wait()
        self._pending, self._outgoing = [], None


class Flush:
    """One flush of the pipeline on one rank; counts its halves and micro-batches in flight."""

    def __init__(self, span: Span, groups: Any, config: Any, shape: tuple[int, ...]) -> None:
        self.span, self.groups, self.config = span, groups, config
        self.stage = groups.pp.rank()
        edge = (shape, config.pipeline_dtype, span._device)
        self.activations = Edge(groups.pp, +1, *edge)
        self.gradients = Edge(groups.pp, -1, *edge)
        self.held: deque[tuple[torch.Tensor | None, torch.Tensor]] = deque()
        self.most_held = 0
        self.forward_halves = 0
        self.backward_halves = 0


def span_forward_backward(
    *,
    span: Span,
    groups: Any,
    forward_step_func: Any,
    data_iterator: Iterator[Any],
    model: list[torch.nn.Module],
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool = False,
) -> list[Any]:
    """Run every micro-batch forward (and backward); returns the losses on the last stage."""
    (chunk,) = model
    config: Any = getattr(chunk, "config")  # noqa: B009
    shape = (seq_length // groups.tp.size(), micro_batch_size, config.hidden_size)
    flush = Flush(span, groups, config, shape)
    losses: list[Any] = []

    def run_forward() -> torch.Tensor:
        received = flush.activations.take()
        output, _ = forward_step(
            forward_step_func,
            data_iterator,
            chunk,
            num_microbatches,
            received,
            losses,
            config,
            cp_group_size=groups.cp.size(),
            is_last_stage=flush.stage == span.stages - 1,
        )
        if not forward_only:
            flush.held.append((received, output))
            flush.most_held = max(flush.most_held, len(flush.held))
        return output

    def run_backward() -> torch.Tensor:
        received, output = flush.held.popleft()
        gradient = flush.gradients.take()
        deallocate_output_tensor(output, config.deallocate_pipeline_outputs)
        result: torch.Tensor = backward_step(received, output, gradient, config)
        return result

    for tick in ticks(span.stages, num_microbatches, forward_only=forward_only):
        if tick.forward:
            span.begin(tick.number, tick.forward, backward=False, keep=not forward_only)
            flush.forward_halves += 1
            output = None
            if flush.stage in tick.forward:
                output = run_forward()
            else:
                for layer in range(span.layers):
                    span.forward(layer)
            flush.activations.post(tick.forward, output)
        if tick.backward:
            # The last stage turns round within the tick; its own edge has nothing in flight.
            span.begin(tick.number, tick.backward, backward=True, keep=False)
            flush.backward_halves += 1
            gradient = None
            if flush.stage in tick.backward:
                gradient = run_backward()
            else:
                for layer in reversed(range(span.layers)):
                    span.backward(layer)
            flush.gradients.post(tick.backward, gradient)
    flush.activations.settle()
    flush.gradients.settle()
    span.end()
    if not forward_only:
        config.finalize_model_grads_func([chunk], None, pg_collection=groups)
    return losses
