"""Pipeline schedule of ``placement=span``: 1F1B in ticks that all stages enter together.

A tick has a forward and a backward slot (`moe_train.features.schedules`). The schedule has the
signature of Megatron's and uses their forward and backward steps, so that loss scaling,
auxiliary-loss scaling and gradient finalisation are Megatron's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
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

from moe_train.features.schedules import Tick, ticks
from moe_train.model.span.dispatcher import CrossStageDispatcher
from moe_train.model.span.interleave import Handoff


class Edge:
    """Point-to-point messages to one neighbour and from the other, one in flight each way.

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

    def start(self, slot: Mapping[int, int], outgoing: torch.Tensor | None) -> None:
        """Start the sends and receives that follow a slot.

        Args:
            slot: micro-batches by active stage; what they computed goes to their neighbours.
            outgoing: this stage's message, if it was active.
        """
        self.wait()
        stage, stages = self._group.rank(), self._group.size()
        operations = []
        if stage in slot and 0 <= stage + self._step < stages:
            assert outgoing is not None
            self._outgoing = outgoing.contiguous()
            peer = dist.get_global_rank(self._group, stage + self._step)
            operations.append(dist.P2POp(dist.isend, self._outgoing, peer, self._group))
        if stage - self._step in slot:
            self._received = torch.empty(
                self._shape, dtype=self._dtype, device=self._device, requires_grad=True
            )
            peer = dist.get_global_rank(self._group, stage - self._step)
            operations.append(dist.P2POp(dist.irecv, self._received.detach(), peer, self._group))
        if operations:
            self._pending = dist.batch_isend_irecv(operations)

    def receive(self) -> torch.Tensor | None:
        """The message of the neighbour's last slot, or None at the end of the pipeline."""
        self.wait()
        received, self._received = self._received, None
        return received

    def wait(self) -> None:
        """Wait for the messages in flight."""
        for work in self._pending:
            work.wait()
        self._pending, self._outgoing = [], None


@dataclass
class FlushCounts:
    """Slots of one pipeline flush on one rank."""

    forward_slots: int = 0
    backward_slots: int = 0
    most_in_flight: int = 0
    """Largest number of micro-batches that were forwarded and not yet backward."""


class SpanSchedule:
    """Callable with the signature of Megatron's schedules.

    Args:
        dispatcher: of the model's layers.
        groups: Megatron's process groups.
        region: ``region(name, category, **facts)`` is entered for every slot in which this stage
            only runs its experts for the others.
    """

    def __init__(
        self,
        dispatcher: CrossStageDispatcher,
        groups: Any,
        region: Callable[..., AbstractContextManager[Any]],
    ) -> None:
        self.dispatcher, self.groups, self.region = dispatcher, groups, region
        self.stage: int = groups.pp.rank()
        self.counts = FlushCounts()
        self._handoff = Handoff(dispatcher.device)

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
            is_last_stage=self.stage == self.dispatcher.stages - 1,
        )
        losses: list[Any] = []
        for tick in ticks(
            self.dispatcher.stages,
            num_microbatches,
            forward_only=forward_only,
            delay=int(self.dispatcher.overlap),
        ):
            forward = partial(flush.forward_slot, tick, step, losses)
            backward = partial(flush.backward_slot, tick)
            if self.dispatcher.overlap and tick.forward and tick.backward:
                self._interleave(forward, backward)
                continue
            if tick.forward:
                forward()
            if tick.backward:
                backward()
        flush.close()
        if not forward_only:
            flush.config.finalize_model_grads_func([chunk], None, pg_collection=self.groups)
        return losses

    def _interleave(self, forward: Callable[[], None], backward: Callable[[], None]) -> None:
        self.dispatcher.switch = self._handoff.switch
        try:
            self._handoff.run(forward, backward)
        finally:
            self.dispatcher.switch = None


class _Flush:
    """One pipeline flush: messages and micro-batches in flight."""

    def __init__(
        self,
        schedule: SpanSchedule,
        chunk: torch.nn.Module,
        seq_length: int,
        micro_batch_size: int,
        forward_only: bool,
    ) -> None:
        self.dispatcher, self.stage = schedule.dispatcher, schedule.stage
        self.region = schedule.region
        config: Any = chunk.config
        self.config = config
        self.forward_only = forward_only
        self.counts = FlushCounts()
        groups = schedule.groups
        shape = (seq_length // groups.tp.size(), micro_batch_size, config.hidden_size)
        dtype, device = config.pipeline_dtype, self.dispatcher.device
        self._activations = Edge(groups.pp, +1, shape, dtype, device)
        self._gradients = Edge(groups.pp, -1, shape, dtype, device)
        self._in_flight: deque[tuple[torch.Tensor | None, torch.Tensor]] = deque()

    def forward_slot(self, tick: Tick, step: Any, losses: list[Any]) -> None:
        """Forward pass of this stage's micro-batch, or of the local experts for other stages."""
        self.dispatcher.begin(tick.number, tick.forward, backward=False, save=not self.forward_only)
        self.counts.forward_slots += 1
        output = None
        if self.stage in tick.forward:
            if not self.forward_only:
                self.counts.most_in_flight = max(
                    self.counts.most_in_flight, len(self._in_flight) + 1
                )
            received = self._activations.receive()
            output, _ = step(input_tensor=received, forward_data_store=losses)
            if not self.forward_only:
                self._in_flight.append((received, output))
        else:
            with self.region("serve", "serve", tick=tick.number):
                for layer in range(self.dispatcher.layers):
                    self.dispatcher.forward(layer)
        self._activations.start(tick.forward, output)

    def backward_slot(self, tick: Tick) -> None:
        """Backward pass of this stage's micro-batch, or of the local experts for other stages."""
        self.dispatcher.begin(tick.number, tick.backward, backward=True, save=False)
        self.counts.backward_slots += 1
        gradient = None
        if self.stage in tick.backward:
            received, output = self._in_flight.popleft()
            incoming = self._gradients.receive()
            deallocate_output_tensor(output, self.config.deallocate_pipeline_outputs)
            gradient = backward_step(received, output, incoming, self.config)
        else:
            with self.region("serve", "serve", tick=tick.number):
                for layer in reversed(range(self.dispatcher.layers)):
                    self.dispatcher.backward(layer)
        self._gradients.start(tick.backward, gradient)

    def close(self) -> None:
        """Wait for the last messages; every micro-batch must have gone backward."""
        self._activations.wait()
        self._gradients.wait()
        assert not self._in_flight
        self.dispatcher.end()
