"""Token dispatcher of ``placement=span``: all-to-all among all stages of a replica, and back.

Every rank of a replica holds experts of every layer. In each slot of the schedule (one stage's
forward or backward pass of a tick) and for each local layer, all ranks of the replica call the same
collectives in the same order. Forward: row counts, tokens with their probabilities, results.
Backward: gradients of the results, gradients of tokens and probabilities; row counts are known by
then. A rank whose own stage is idle sends no rows and still runs its experts for the others.

Every all-to-all is started, other work may run, then it is awaited. With
``parallel.overlap_expert_comm`` that work is the tick's other slot or the shared experts; without
it there is none.

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

from moe_train.backend.device import to_host
from moe_train.backend.groups import lost_peer
from moe_train.errors import HungError
from moe_train.model.span.experts import PROBS, LocalExperts, Saved
from moe_train.model.span.packing import pack, unpack, width


@dataclass(frozen=True)
class Slot:
    """Forward or backward slot of a tick, the same on every rank of the replica."""

    active: frozenset[int] = frozenset()
    """Stages that have a micro-batch."""
    save: bool = False
    """Save for the backward pass."""
    name: str = ""
    """Tick and direction, for error messages."""


@dataclass(frozen=True)
class Counts:
    """Rows that move in one layer and forward slot, as integers in host memory."""

    sent: list[int]
    """To each rank."""
    in_RE: NDArray[np.int64] | None
    """Received, by source rank and local expert; None in a recomputed layer."""


FORWARD, BACKWARD = 0, 1


class CrossStageDispatcher:
    """One rank's dispatcher, for all its local layers.

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
        self._experts: dict[int, LocalExperts] = {}
        self._sent: dict[int, deque[list[int]]] = {}
        self._saved: dict[tuple[int, int], deque[Saved]] = {}
        self._slots = {FORWARD: Slot(), BACKWARD: Slot()}
        self.switch: Callable[[int], None] | None = None
        """Called with the direction whose all-to-all is under way; set by the schedule."""

    @property
    def layers(self) -> int:
        """Layers of a stage."""
        return len(self._experts)

    def register(self, layer: int, experts: LocalExperts) -> None:
        """Set this rank's experts of local layer ``layer``, for all stages."""
        assert layer not in self._experts
        self._experts[layer] = experts

    def begin(self, tick: int, active: Iterable[int], *, backward: bool, save: bool) -> None:
        """Enter a slot, the same on every rank of the replica.

        Args:
            active: stages that have a micro-batch in this slot.
            save: a backward pass will follow this forward slot.
        """
        name = f"tick {tick}, {'backward' if backward else 'forward'} slot"
        direction = BACKWARD if backward else FORWARD
        self._slots[direction] = Slot(frozenset(active), save, name)

    def end(self) -> None:
        """End a pipeline flush: everything saved for the backward pass must have been used."""
        assert not any(self._sent.values()) and not any(self._saved.values())

    def counts(self, layer: int, counts: torch.Tensor | None) -> Counts:
        """First collective of a layer: every rank learns how many rows it will receive.

        In a recomputed layer they are known already, and there is no communication.

        Args:
            counts: rows for each expert of the layer [R * E]; None sends none.
        """
        if recomputed():
            return Counts(self._sent[layer][0], None)
        return Counts(*self.exchange_counts(layer, counts))

    def exchange_counts(
        self, layer: int, counts: torch.Tensor | None
    ) -> tuple[list[int], NDArray[np.int64]]:
        """All-to-all of the row counts, and their only copy to host memory.

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
        overlapped: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Dispatch one layer's tokens, run the local experts and combine the results.

        Without tokens this rank only runs its experts for the others.

        Args:
            counts: result of :meth:`counts`.
            tokens_NH, probs_N: this rank's routed tokens, sorted by expert.
            overlapped: work that does not depend on the routed experts, such as shared experts;
                called while the tokens are under way.

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
        self._all_to_all(FORWARD, layer, packed_in, packed, received, sent, overlapped)
        outputs = self._run_experts(layer, in_RE, packed_in)
        result_NH = self._empty(sum(sent))
        self._all_to_all(FORWARD, layer, result_NH, outputs, sent, received)
        if self._slots[FORWARD].save and tokens_NH is not None:
            self._sent.setdefault(layer, deque()).append(sent)
        return result_NH

    def _run_experts(
        self, layer: int, in_RE: NDArray[np.int64], packed: torch.Tensor
    ) -> torch.Tensor:
        slot = self._slots[FORWARD]
        by_stage = in_RE.reshape(self.stages, self.tensor, -1)
        for stage in set(range(self.stages)) - slot.active:
            assert not by_stage[stage].any(), f"tokens from idle stage {stage} at {slot.name}"
        active = {stage: by_stage[stage] for stage in sorted(slot.active)}
        outputs, saved = self._experts[layer].forward(active, packed, save=slot.save)
        for stage, one in saved.items():
            self._saved.setdefault((layer, stage), deque()).append(one)
        return outputs

    def backward(
        self, layer: int, grad_NH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Backward pass of :meth:`forward`: the same collectives in the opposite direction.

        Without a gradient this rank only runs its experts' backward pass for the others.

        Args:
            grad_NH: gradient of :meth:`forward`'s result [N, H].

        Returns:
            Gradients of this rank's tokens [N, H] and probabilities [N].
        """
        ranks = self.group.size()
        sent = self._sent[layer].popleft() if grad_NH is not None else [0] * ranks
        saved = {
            stage: self._saved[layer, stage].popleft()
            for stage in sorted(self._slots[BACKWARD].active)
        }
        received = [
            rows
            for stage in range(self.stages)
            for rows in (saved[stage].rows if stage in saved else [0] * self.tensor)
        ]
        grads_in = self._empty(sum(received))
        outgoing = self._empty(0) if grad_NH is None else grad_NH.contiguous()
        self._all_to_all(BACKWARD, layer, grads_in, outgoing, received, sent)
        packed_out = self._experts[layer].backward(saved, grads_in)
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
        overlapped: Callable[[], None] | None = None,
    ) -> None:
        with self._lost_peer_named(direction, layer):
            work = dist.all_to_all_single(
                output, data, output_splits, input_splits, group=self.group, async_op=True
            )
            assert work is not None
            if not self.overlap:
                work.wait()
        if overlapped is not None:
            overlapped()
        if self.overlap:
            if self.switch is not None:
                self.switch(direction)
            with self._lost_peer_named(direction, layer):
                work.wait()

    @contextlib.contextmanager
    def _lost_peer_named(self, direction: int, layer: int) -> Iterator[None]:
        """Name tick and layer if a peer was lost; any other failure passes unchanged."""
        try:
            yield
        except RuntimeError as failure:
            if lost_peer(failure) is None:
                raise
            raise HungError(
                f"rank {dist.get_rank()}",
                f"all-to-all of local layer {layer} failed in {self._slots[direction].name}: "
                f"{failure}",
                "a peer was lost or hung: look at the other ranks' logs, then resume",
            ) from failure


def recomputed() -> bool:
    """Whether this forward pass is the recomputation of a layer inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


class DispatchAndCombine(torch.autograd.Function):
    """The dispatcher in the autograd graph of the micro-batch whose tokens it moves."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        dispatcher: CrossStageDispatcher,
        layer: int,
        counts: Counts,
        tokens_NH: torch.Tensor,
        probs_N: torch.Tensor,
        overlapped: Callable[[], None] | None,
    ) -> torch.Tensor:
        """Expert outputs [N, H] in the order of ``tokens_NH``."""
        ctx.dispatcher, ctx.layer = dispatcher, layer
        ctx.probs_dtype = probs_N.dtype
        if recomputed():
            # All that follows the experts is linear in their output, so no gradient depends on its
            # value, and nothing is dispatched again.
            if overlapped is not None:
                overlapped()
            return torch.zeros_like(tokens_NH)
        return dispatcher.forward(layer, counts, tokens_NH, probs_N, overlapped)

    @staticmethod
    def backward(ctx: Any, grad_NH: torch.Tensor) -> Any:  # type: ignore[override]
        """Gradients of tokens [N, H] and probabilities [N], from the experts' owner ranks."""
        tokens_NH, probs_N = ctx.dispatcher.backward(ctx.layer, grad_NH)
        return None, None, None, tokens_NH, probs_N.to(ctx.probs_dtype), None
