"""The expert side: run the tokens of all active stages through the experts hosted here, and back.

Two ways, for two families of kernels:

- :class:`Merged`: the experts of all stages are one module, and a half is one grouped product over
  them all. Stages that go forward together do not go backward together, which the module has to
  stand (``moe_train/backend/torch_kernels/replay.py``).
- :class:`Staged`: a module for each stage, whose tokens have an autograd graph of their own
  between their forward and backward pass. TransformerEngine's modules cannot be replayed.

Shape letters: N tokens, H hidden width, A active stages, T source ranks of a stage (its
tensor-parallel size), E experts of a layer hosted here, F width of the first product's result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from numpy.typing import NDArray

from moe_train.backend.torch_kernels.replay import backward, record
from moe_train.model.span.packing import pack, unpack

PROBS = torch.float32
"""Dtype of routing probabilities (``moe_router_dtype=fp32``)."""

Counts = NDArray[np.int64]


@dataclass
class Hosted:
    """One stage's tokens of one micro-batch and layer, kept until that stage comes back."""

    counts_TE: Counts
    tokens_NH: torch.Tensor
    """Merged: sorted by expert. Staged: by source rank and expert, as they came."""
    probs_N: torch.Tensor
    result: torch.Tensor | None
    """Merged: the first product's result [N, F]. Staged: the experts' output with its graph.
    None where the experts run again in the backward pass."""

    @property
    def rows(self) -> list[int]:
        """Tokens from each source rank of the stage."""
        rows: list[int] = self.counts_TE.sum(axis=1).tolist()
        return rows


class Host(Protocol):
    """The experts of one local layer."""

    per_rank: int
    """Experts of a layer on this rank."""

    def forward(
        self, counts: Mapping[int, Counts], packed_NW: torch.Tensor, *, keep: bool
    ) -> tuple[torch.Tensor, dict[int, Hosted]]:
        """Run the active stages' tokens.

        Args:
            counts: of each active stage in order, tokens by source rank and expert [T, E].
            packed_NW: tokens and probabilities by stage, source rank and expert.
            keep: a backward pass will follow.

        Returns:
            Results [N, H] in the order of the rows, and by stage what the backward pass needs.
        """

    def backward(self, hosted: Mapping[int, Hosted], grad_NH: torch.Tensor) -> torch.Tensor:
        """Packed gradients [N, W] of tokens and probabilities; weights accumulate theirs."""


class Merged:
    """Experts of all stages in one module, ordered by stage.

    Args:
        module: a grouped module of ``stages * per_rank`` experts that can be replayed.
        recompute: keep the inputs only, and run both products again.
    """

    def __init__(
        self, module: Any, stages: int, per_rank: int, hidden: int, *, recompute: bool
    ) -> None:
        self._module, self._stages, self.per_rank = module, stages, per_rank
        self._hidden, self._recompute = hidden, recompute

    def forward(
        self, counts: Mapping[int, Counts], packed_NW: torch.Tensor, *, keep: bool
    ) -> tuple[torch.Tensor, dict[int, Hosted]]:
        """See :class:`Host`."""
        order = Order(list(counts.values()))
        tokens_NH, probs_N = unpack(packed_NW, self._hidden, PROBS, copy=order.sorted)
        tokens_NH, probs_N = order.by_expert(tokens_NH), order.by_expert(probs_N)
        output_NH, result_NF = record(self._module, tokens_NH, self._rows(counts), probs_N)
        hosted: dict[int, Hosted] = {}
        if keep:
            rows = [int(each.sum()) for each in counts.values()]
            kept = [tokens_NH, probs_N, *([] if self._recompute else [result_NF])]
            if len(rows) > 1:
                # Stages come back at different times: none may hold the others' memory.
                kept_by_stage = [[p.clone() for p in one.split(rows)] for one in kept]
            else:
                kept_by_stage = [[one] for one in kept]
            for index, (stage, counts_TE) in enumerate(counts.items()):
                tokens, probs, *result = (parts[index] for parts in kept_by_stage)
                hosted[stage] = Hosted(counts_TE, tokens, probs, result[0] if result else None)
        return order.by_source(output_NH), hosted

    def backward(self, hosted: Mapping[int, Hosted], grad_NH: torch.Tensor) -> torch.Tensor:
        """See :class:`Host`."""
        counts = {stage: one.counts_TE for stage, one in hosted.items()}
        order, rows_E = Order(list(counts.values())), self._rows(counts)
        grad_NH = order.by_expert(grad_NH)
        busy = [one for one in hosted.values() if one.counts_TE.any()]
        inputs = [one.tokens_NH for one in busy]
        probs_N = _joined([one.probs_N for one in busy], grad_NH.new_empty(0, dtype=PROBS))
        grads = backward(
            self._module,
            inputs,
            rows_E,
            probs_N,
            # Held by the callee alone, which drops it as soon as it can.
            None if self._recompute else _results(busy, grad_NH),
            grad_NH,
            parts=self._stages,
        )
        return order.by_source(pack(*grads))

    def _rows(self, counts: Mapping[int, Counts]) -> Counts:
        rows = np.zeros((self._stages, self.per_rank), dtype=np.int64)
        for stage, counts_TE in counts.items():
            rows[stage] = counts_TE.sum(axis=0)
        return rows.ravel()


def _joined(parts: Sequence[Any], nothing: torch.Tensor) -> torch.Tensor:
    if len(parts) > 1:
        return torch.cat(list(parts))
    whole: torch.Tensor = parts[0] if parts else nothing
    return whole


def _results(busy: Sequence[Hosted], nothing: torch.Tensor) -> torch.Tensor:
    """The first product's results of all, which hold their parts no longer."""
    result = _joined([one.result for one in busy], nothing)
    for one in busy:
        one.result = None
    return result


class Order:
    """Rows by stage, source rank and expert <-> rows by stage, expert and source rank.

    Args:
        counts: tokens of each active stage [T, E].
    """

    def __init__(self, counts: Sequence[Counts]) -> None:
        self._counts = np.stack(counts) if counts else np.zeros((0, 1, 1), dtype=np.int64)
        chunks = np.arange(self._counts.size).reshape(self._counts.shape)
        self._sorted = chunks.transpose(0, 2, 1).ravel()

    @property
    def sorted(self) -> bool:
        """Both orders are the same: a stage has one source rank."""
        return bool(self._counts.shape[1] == 1)

    def by_expert(self, rows: torch.Tensor) -> torch.Tensor:
        """From source order."""
        return self._moved(rows, self._counts.ravel(), self._sorted)

    def by_source(self, rows: torch.Tensor) -> torch.Tensor:
        """Back to source order."""
        return self._moved(rows, self._counts.ravel()[self._sorted], np.argsort(self._sorted))

    def _moved(self, rows: torch.Tensor, sizes: Counts, order: Counts) -> torch.Tensor:
        if self.sorted:
            return rows
        moved: torch.Tensor = sort_chunks_by_idxs(rows, sizes, order)[0]
        return moved


class Staged:
    """A grouped module for each stage, one after the other.

    Args:
        modules: by stage; each takes tokens, rows by expert and probabilities.
        recompute: keep the inputs only.
    """

    def __init__(self, modules: Any, per_rank: int, hidden: int, *, recompute: bool) -> None:
        self._modules, self.per_rank = modules, per_rank
        self._hidden, self._recompute = hidden, recompute

    def forward(
        self, counts: Mapping[int, Counts], packed_NW: torch.Tensor, *, keep: bool
    ) -> tuple[torch.Tensor, dict[int, Hosted]]:
        """See :class:`Host`."""
        outputs, hosted, start = [], {}, 0
        for stage, counts_TE in counts.items():
            end = start + int(counts_TE.sum())
            one = Hosted(counts_TE, *unpack(packed_NW[start:end], self._hidden, PROBS), None)
            start, graph = end, keep and not self._recompute
            if keep:
                one.tokens_NH.requires_grad_()
                one.probs_N.requires_grad_()
                hosted[stage] = one
            # Also with no tokens at all: gradient reduction counts on every use of a weight.
            with torch.set_grad_enabled(graph):
                output_NH = self._run(stage, one)
            if graph:
                one.result = output_NH
            outputs.append(output_NH.detach())
        return torch.cat(outputs), hosted

    def backward(self, hosted: Mapping[int, Hosted], grad_NH: torch.Tensor) -> torch.Tensor:
        """See :class:`Host`."""
        back, start = [], 0
        for stage, one in hosted.items():
            end = start + sum(one.rows)
            output_NH = one.result
            if output_NH is None:
                with torch.enable_grad():
                    output_NH = self._run(stage, one)
            torch.autograd.backward(output_NH, grad_NH[start:end])
            start = end
            assert one.tokens_NH.grad is not None and one.probs_N.grad is not None
            back.append(pack(one.tokens_NH.grad, one.probs_N.grad))
        return torch.cat(back)

    def _run(self, stage: int, one: Hosted) -> torch.Tensor:
        order = Order([one.counts_TE])
        output_NH, _ = self._modules[stage](
            order.by_expert(one.tokens_NH), one.counts_TE.sum(axis=0), order.by_expert(one.probs_N)
        )
        return order.by_source(output_NH)
