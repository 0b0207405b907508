"""The tick-aligned 1F1B schedule that ``placement=span`` runs on (see parallel/ticks.py).

It has the signature of Megatron's schedules and uses their forward and backward steps, so that
loss scaling, auxiliary-loss scaling and gradient finalisation are Megatron's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import (
    backward_step,
    deallocate_output_tensor,
    forward_step,
)

from moe_train.model.span.exchange import Span
from moe_train.parallel.ticks import Tick, ticks
from moe_train.train.interleave import Turns
from moe_train.train.tracing import Tracer


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


@dataclass
class FlushCounts:
    """What one flush did on one rank."""

    forward_halves: int = 0
    backward_halves: int = 0
    most_held: int = 0
    """Most micro-batches whose activations were held at once."""


class SpanSchedule:
    """Callable with the signature of Megatron's schedules.

    Args:
        span: the exchange that the model's layers use.
        groups: Megatron's process groups.
        tracer: is told of the halves in which this stage serves the others.
    """

    def __init__(self, span: Span, groups: Any, tracer: Tracer) -> None:
        self.span, self.groups, self.tracer = span, groups, tracer
        self.stage: int = groups.pp.rank()
        self.counts = FlushCounts()
        self._turns = Turns(span.device)

    def __call__(
        self,
        *,
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
        flush = _Flush(self, chunk, seq_length, micro_batch_size, forward_only)
        self.counts = flush.counts
        step = partial(
            forward_step,
            forward_step_func,
            data_iterator,
            chunk,
            num_microbatches,
            config=flush.config,
            cp_group_size=self.groups.cp.size(),
            is_last_stage=self.stage == self.span.stages - 1,
        )
        losses: list[Any] = []
        halves = ticks(
            self.span.stages,
            num_microbatches,
            forward_only=forward_only,
            delay=int(self.span.overlap),
        )
        for tick in halves:
            forward = partial(flush.forward_half, tick, step, losses)
            backward = partial(flush.backward_half, tick)
            if self.span.overlap and tick.forward and tick.backward:
                self._side_by_side(forward, backward)
                continue
            if tick.forward:
                forward()
            if tick.backward:
                backward()
        flush.close()
        if not forward_only:
            flush.config.finalize_model_grads_func([chunk], None, pg_collection=self.groups)
        return losses

    def _side_by_side(self, forward: Callable[[], None], backward: Callable[[], None]) -> None:
        self.span.yield_turn = self._turns.give
        try:
            self._turns.run(forward, backward)
        finally:
            self.span.yield_turn = None


class _Flush:
    """The state of one flush: messages in flight and micro-batches held."""

    def __init__(
        self,
        schedule: SpanSchedule,
        chunk: torch.nn.Module,
        seq_length: int,
        micro_batch_size: int,
        forward_only: bool,
    ) -> None:
        self.span, self.stage, self.tracer = schedule.span, schedule.stage, schedule.tracer
        config: Any = chunk.config
        self.config = config
        self.forward_only = forward_only
        self.counts = FlushCounts()
        groups = schedule.groups
        shape = (seq_length // groups.tp.size(), micro_batch_size, config.hidden_size)
        dtype, device = config.pipeline_dtype, self.span.device
        self._activations = Edge(groups.pp, +1, shape, dtype, device)
        self._gradients = Edge(groups.pp, -1, shape, dtype, device)
        self._held: deque[tuple[torch.Tensor | None, torch.Tensor]] = deque()

    def forward_half(self, tick: Tick, step: Any, losses: list[Any]) -> None:
        """Compute this stage's micro-batch, or serve its experts to the others."""
        self.span.begin(tick.number, tick.forward, backward=False, keep=not self.forward_only)
        self.counts.forward_halves += 1
        output = None
        if self.stage in tick.forward:
            if not self.forward_only:
                self.counts.most_held = max(self.counts.most_held, len(self._held) + 1)
            received = self._activations.take()
            output, _ = step(input_tensor=received, forward_data_store=losses)
            if not self.forward_only:
                self._held.append((received, output))
        else:
            with self.tracer.region("serve", "serve", tick=tick.number):
                for layer in range(self.span.layers):
                    self.span.forward(layer)
        self._activations.post(tick.forward, output)

    def backward_half(self, tick: Tick) -> None:
        """The same for the micro-batch whose turn it is to go back."""
        self.span.begin(tick.number, tick.backward, backward=True, keep=False)
        self.counts.backward_halves += 1
        gradient = None
        if self.stage in tick.backward:
            received, output = self._held.popleft()
            incoming = self._gradients.take()
            deallocate_output_tensor(output, self.config.deallocate_pipeline_outputs)
            gradient = backward_step(received, output, incoming, self.config)
        else:
            with self.tracer.region("serve", "serve", tick=tick.number):
                for layer in reversed(range(self.span.layers)):
                    self.span.backward(layer)
        self._gradients.post(tick.backward, gradient)

    def close(self) -> None:
        """Wait for the last messages; everything held must have been used."""
        self._activations.settle()
        self._gradients.settle()
        assert not self._held
        self.span.end()
