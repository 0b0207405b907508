"""The exchange of ``placement=span``: tokens of any stage to all ranks of the replica and back.

Forward, per local layer and half-tick, on every rank of the replica and in this order: counts,
tokens with probabilities, results. Backward: gradients of the results, gradients of tokens with
probabilities; both sides know the counts by then. A rank whose own stage is idle sends nothing
and still serves its experts.

Every all-to-all is started, then the program may do something else, then it is awaited: with
``parallel.overlap_expert_comm`` that is the tick's other half or the shared experts, without it
nothing.

Shape letters: N tokens, H hidden width, R ranks of the replica, E experts of a layer per rank.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moe_train.backend.groups import lost_peer
from moe_train.backend.host_copy import to_host
from moe_train.errors import HungError
from moe_train.model.span.hosting import PROBS, Host, Hosted
from moe_train.model.span.packing import pack, unpack, width


@dataclass(frozen=True)
class Half:
    """The half-tick that a direction is in, the same on every rank of the replica."""

    active: frozenset[int] = frozenset()
    """Stages that have a micro-batch."""
    keep: bool = False
    """A backward pass will follow this forward half."""
    place: str = ""


@dataclass(frozen=True)
class Counts:
    """Rows that change places in one layer and forward half, as numbers on the host."""

    sent: list[int]
    """To each rank."""
    in_RE: NDArray[np.int64] | None
    """Received, by source rank and local expert; None in a recomputed layer."""


FORWARD, BACKWARD = 0, 1


class Span:
    """One rank's part in the exchange, for all its local layers.

    Args:
        group: all ranks of one data-parallel replica, tensor-parallel ranks first.
        tensor, stages: TP and PP sizes.
        hidden, dtype: of the tokens.
        recompute: run the experts again in the backward pass instead of keeping activations.
        overlap: do other work while an all-to-all is under way.
    """

    def __init__(
        self,
        group: Any,
        *,
        tensor: int,
        stages: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        recompute: bool,
        overlap: bool = False,
    ) -> None:
        assert group.size() == tensor * stages
        self.group, self.tensor, self.stages = group, tensor, stages
        self._hidden, self._dtype, self.device = hidden, dtype, device
        self.recompute, self.overlap = recompute, overlap
        self._experts: dict[int, Host] = {}
        self._sent: dict[int, deque[list[int]]] = {}
        self._hosted: dict[tuple[int, int], deque[Hosted]] = {}
        self._halves = {FORWARD: Half(), BACKWARD: Half()}
        self.yield_turn: Callable[[int], None] | None = None
        """Called with a direction whose all-to-all is under way; set by the schedule."""

    @property
    def layers(self) -> int:
        """Layers of a stage."""
        return len(self._experts)

    def register(self, layer: int, experts: Host) -> None:
        """Announce the experts of local layer ``layer``, of all stages."""
        assert layer not in self._experts
        self._experts[layer] = experts

    def begin(self, tick: int, active: Iterable[int], *, backward: bool, keep: bool) -> None:
        """Enter a half-tick, the same on every rank of the replica.

        Args:
            active: stages that have a micro-batch in this half.
            keep: a backward pass will follow this forward half.
        """
        place = f"tick {tick}, {'backward' if backward else 'forward'} half"
        direction = BACKWARD if backward else FORWARD
        self._halves[direction] = Half(frozenset(active), keep, place)

    def end(self) -> None:
        """Leave a flush: everything kept must have been used."""
        assert not any(self._sent.values()) and not any(self._hosted.values())

    def counts(self, layer: int, counts: torch.Tensor | None) -> Counts:
        """Begin a layer: tell every rank how many rows it gets.

        A recomputed layer asks for what it has sent already, and nothing is exchanged again.

        Args:
            counts: rows for each expert of the layer; None sends none.
        """
        if recomputed():
            return Counts(self._sent[layer][0], None)
        return Counts(*self.exchange_counts(layer, counts))

    def exchange_counts(
        self, layer: int, counts: torch.Tensor | None
    ) -> tuple[list[int], NDArray[np.int64]]:
        """The exchange of counts, and their one way off the device.

        Returns:
            Rows sent to each rank, and rows received by source rank and local expert [R, E].
        """
        ranks, experts = self.group.size(), self._experts[layer].per_rank
        both_2RE = torch.zeros(2, ranks, experts, dtype=torch.int64, device=self.device)
        if counts is not None:
            both_2RE[0] = counts.view(ranks, experts)
        self._all_to_all(FORWARD, layer, both_2RE[1], both_2RE[0])
        out_RE, in_RE = to_host(both_2RE)
        return out_RE.sum(axis=1).tolist(), in_RE

    def forward(
        self,
        layer: int,
        counts: Counts | None = None,
        tokens_NH: torch.Tensor | None = None,
        probs_N: torch.Tensor | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Exchange one layer's tokens; without tokens, serve the others.

        Args:
            counts: of :meth:`counts`.
            tokens_NH, probs_N: this rank's routed tokens, sorted by expert.
            meanwhile: work that does not depend on the exchange, such as shared experts.

        Returns:
            Expert outputs [N, H] in the order of ``tokens_NH``.
        """
        counts = counts or self.counts(layer, None)
        sent, in_RE = counts.sent, counts.in_RE
        assert in_RE is not None
        if tokens_NH is None or probs_N is None:
            packed = self._empty(0, packed=True)
        else:
            packed = pack(tokens_NH.detach(), probs_N.detach().to(PROBS))
        received: list[int] = in_RE.sum(axis=1).tolist()
        packed_in = self._empty(sum(received), packed=True)
        self._all_to_all(FORWARD, layer, packed_in, packed, received, sent, meanwhile)
        outputs = self._host(layer, in_RE, packed_in)
        result_NH = self._empty(sum(sent))
        self._all_to_all(FORWARD, layer, result_NH, outputs, sent, received)
        if self._halves[FORWARD].keep and tokens_NH is not None:
            self._sent.setdefault(layer, deque()).append(sent)
        return result_NH

    def _host(self, layer: int, in_RE: NDArray[np.int64], packed: torch.Tensor) -> torch.Tensor:
        half = self._halves[FORWARD]
        by_stage = in_RE.reshape(self.stages, self.tensor, -1)
        for stage in set(range(self.stages)) - half.active:
            assert not by_stage[stage].any(), f"tokens from idle stage {stage} at {half.place}"
        active = {stage: by_stage[stage] for stage in sorted(half.active)}
        outputs, hosted = self._experts[layer].forward(active, packed, keep=half.keep)
        for stage, one in hosted.items():
            self._hosted.setdefault((layer, stage), deque()).append(one)
        return outputs

    def backward(
        self, layer: int, grad_NH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mirrored exchange; without a gradient, serve the others.

        Args:
            grad_NH: gradient of :meth:`forward`'s result.

        Returns:
            Gradients of this rank's tokens [N, H] and probabilities [N].
        """
        ranks = self.group.size()
        sent = self._sent[layer].popleft() if grad_NH is not None else [0] * ranks
        hosted = {
            stage: self._hosted[layer, stage].popleft()
            for stage in sorted(self._halves[BACKWARD].active)
        }
        received = [
            rows
            for stage in range(self.stages)
            for rows in (hosted[stage].rows if stage in hosted else [0] * self.tensor)
        ]
        grads_in = self._empty(sum(received))
        outgoing = self._empty(0) if grad_NH is None else grad_NH.contiguous()
        self._all_to_all(BACKWARD, layer, grads_in, outgoing, received, sent)
        packed_out = self._experts[layer].backward(hosted, grads_in)
        packed = self._empty(sum(sent), packed=True)
        self._all_to_all(BACKWARD, layer, packed, packed_out, sent, received)
        return unpack(packed, self._hidden, PROBS)

    def _empty(self, rows: int, packed: bool = False) -> torch.Tensor:
        columns = width(self._hidden, self._dtype, PROBS) if packed else self._hidden
        return torch.empty(rows, columns, dtype=self._dtype, device=self.device)

    def _all_to_all(
        self,
        direction: int,
        layer: int,
        output: torch.Tensor,
        data: torch.Tensor,
        output_splits: list[int] | None = None,
        input_splits: list[int] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        with self._naming(direction, layer):
            work = dist.all_to_all_single(
                output, data, output_splits, input_splits, group=self.group, async_op=True
            )
            assert work is not None
            if not self.overlap:
                work.wait()
        if meanwhile is not None:
            meanwhile()
        if self.overlap:
            if self.yield_turn is not None:
                self.yield_turn(direction)
            with self._naming(direction, layer):
                work.wait()

    @contextlib.contextmanager
    def _naming(self, direction: int, layer: int) -> Iterator[None]:
        """Say where the exchange was when a peer was lost; any other failure passes as it is."""
        try:
            yield
        except RuntimeError as failure:
            if lost_peer(failure) is None:
                raise
            raise HungError(
                f"rank {dist.get_rank()}",
                f"the exchange of local layer {layer} failed at {self._halves[direction].place}: "
                f"{failure}",
                "a peer was lost or hung: look at the other ranks' logs, then resume",
            ) from failure


def recomputed() -> bool:
    """Whether this forward pass runs inside a backward pass: of a layer that is recomputed."""
    return torch._C._current_graph_task_id() != -1


class Exchange(torch.autograd.Function):
    """The source side of the exchange, in the autograd graph of a micro-batch."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        span: Span,
        layer: int,
        counts: Counts,
        tokens_NH: torch.Tensor,
        probs_N: torch.Tensor,
        meanwhile: Callable[[], None] | None,
    ) -> torch.Tensor:
        """Expert outputs [N, H] in the order of ``tokens_NH``."""
        ctx.span, ctx.layer = span, layer
        ctx.probs_dtype = probs_N.dtype
        if recomputed():
            # All that follows the experts is linear in their output, so no gradient depends on its
            # value and no exchange is repeated.
            if meanwhile is not None:
                meanwhile()
            return torch.zeros_like(tokens_NH)
        return span.forward(layer, counts, tokens_NH, probs_N, meanwhile)

    @staticmethod
    def backward(ctx: Any, grad_NH: torch.Tensor) -> Any:  # type: ignore[override]
        """Gradients of tokens and probabilities, from the ranks that host the experts."""
        tokens_NH, probs_N = ctx.span.backward(ctx.layer, grad_NH)
        return None, None, None, tokens_NH, probs_N.to(ctx.probs_dtype), None
