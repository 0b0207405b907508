"""Experts of ``placement=span``: this rank's experts of one local layer, for all pipeline stages.

:class:`SpanExperts` is the module; its experts run in one of two ways, by family of kernels:

- :class:`MergedExperts`: the experts of all stages are one grouped module, and a slot is one
  grouped product over them all. Stages that go forward together do not go backward together, so
  the products are recorded and replayed (``moe_train/backend/torch_kernels/replay.py``).
- :class:`StageExperts`: a module for each stage, whose tokens have an autograd graph of their own
  from their forward to their backward pass. TransformerEngine's modules cannot be replayed.

Shape letters: N tokens, H hidden width, W width of a packed row, T source ranks of a stage (its
tensor-parallel size), E experts of a layer on this rank, F width of the first product's result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from megatron.core.transformer.transformer_config import TransformerConfig
from numpy.typing import NDArray

from moe_train.backend.torch_kernels.replay import backward, record
from moe_train.model.span.packing import pack, unpack

PROBS = torch.float32
"""Dtype of routing probabilities (``moe_router_dtype=fp32``)."""

Counts = NDArray[np.int64]


@dataclass
class Saved:
    """Saved for backward: one stage's tokens of one micro-batch and layer."""

    counts_TE: Counts
    tokens_NH: torch.Tensor
    """MergedExperts: sorted by expert. Per stage: by source rank and expert, as received."""
    probs_N: torch.Tensor
    result: torch.Tensor | None
    """MergedExperts: first product's result [N, F]. Per stage: the experts' output with its graph.
    None where the experts run again in the backward pass."""

    @property
    def rows(self) -> list[int]:
        """Tokens from each source rank of the stage."""
        rows: list[int] = self.counts_TE.sum(axis=1).tolist()
        return rows


class LocalExperts(Protocol):
    """This rank's experts of one local layer, for all stages."""

    per_rank: int
    """Experts of a global layer on this rank, E."""

    def forward(
        self, counts: Mapping[int, Counts], packed_NW: torch.Tensor, *, save: bool
    ) -> tuple[torch.Tensor, dict[int, Saved]]:
        """Run the active stages' tokens.

        Args:
            counts: of each active stage in order, tokens by source rank and expert [T, E].
            packed_NW: tokens and probabilities by stage, source rank and expert.
            save: a backward pass will follow.

        Returns:
            Results [N, H] in the order of the rows, and what is saved for backward, by stage.
        """

    def backward(self, saved: Mapping[int, Saved], grad_NH: torch.Tensor) -> torch.Tensor:
        """Packed gradients [N, W] of tokens and probabilities; weights accumulate their own.

        Args:
            saved: of the active stages in order.
            grad_NH: gradients of the results, by stage, source rank and expert.
        """


class MergedExperts:
    """Experts of all stages in one grouped module, ordered by stage.

    Args:
        module: a grouped module of ``stages * per_rank`` experts that can be replayed.
        recompute: save the inputs only, and run both products again in the backward pass.
    """

    def __init__(
        self, module: Any, stages: int, per_rank: int, hidden: int, *, recompute: bool
    ) -> None:
        self._module, self._stages, self.per_rank = module, stages, per_rank
        self._hidden, self._recompute = hidden, recompute

    def forward(
        self, counts: Mapping[int, Counts], packed_NW: torch.Tensor, *, save: bool
    ) -> tuple[torch.Tensor, dict[int, Saved]]:
        """See :class:`LocalExperts`."""
        order = Order(list(counts.values()))
        tokens_NH, probs_N = unpack(packed_NW, self._hidden, PROBS, copy=order.sorted)
        tokens_NH, probs_N = order.by_expert(tokens_NH), order.by_expert(probs_N)
        output_NH, result_NF = record(self._module, tokens_NH, self._rows(counts), probs_N)
        saved: dict[int, Saved] = {}
        if save:
            rows = [int(each.sum()) for each in counts.values()]
            tensors = [tokens_NH, probs_N, *([] if self._recompute else [result_NF])]
            if len(rows) > 1:
                # Stages go backward at different times: none may hold the others' memory.
                by_stage = [[part.clone() for part in one.split(rows)] for one in tensors]
            else:
                by_stage = [[one] for one in tensors]
            for index, (stage, counts_TE) in enumerate(counts.items()):
                tokens, probs, *result = (parts[index] for parts in by_stage)
                saved[stage] = Saved(counts_TE, tokens, probs, result[0] if result else None)
        return order.by_source(output_NH), saved

    def backward(self, saved: Mapping[int, Saved], grad_NH: torch.Tensor) -> torch.Tensor:
        """See :class:`LocalExperts`."""
        counts = {stage: one.counts_TE for stage, one in saved.items()}
        order, rows_E = Order(list(counts.values())), self._rows(counts)
        grad_NH = order.by_expert(grad_NH)
        busy = [one for one in saved.values() if one.counts_TE.any()]
        inputs = [one.tokens_NH for one in busy]
        probs_N = _joined([one.probs_N for one in busy], grad_NH.new_empty(0, dtype=PROBS))
        grads = backward(
            self._module,
            inputs,
            rows_E,
            probs_N,
            # The callee holds the only reference, and drops it as early as it can.
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


def _results(busy: Sequence[Saved], nothing: torch.Tensor) -> torch.Tensor:
    """The first product's results of all, moved out of ``busy``."""
    result = _joined([one.result for one in busy], nothing)
    for one in busy:
        one.result = None
    return result


class Order:
    """Permutation between rows by (stage, source rank, expert) and by (stage, expert, source rank).

    Args:
        counts: tokens of each active stage [T, E].
    """

    def __init__(self, counts: Sequence[Counts]) -> None:
        self._counts = np.stack(counts) if counts else np.zeros((0, 1, 1), dtype=np.int64)
        chunks = np.arange(self._counts.size).reshape(self._counts.shape)
        self._sorted = chunks.transpose(0, 2, 1).ravel()

    @property
    def sorted(self) -> bool:
        """Whether both orders are the same: a stage has one source rank."""
        return bool(self._counts.shape[1] == 1)

    def by_expert(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [N, ...] from source order."""
        return self._permuted(rows, self._counts.ravel(), self._sorted)

    def by_source(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [N, ...] back to source order."""
        return self._permuted(rows, self._counts.ravel()[self._sorted], np.argsort(self._sorted))

    def _permuted(self, rows: torch.Tensor, sizes: Counts, order: Counts) -> torch.Tensor:
        if self.sorted:
            return rows
        moved: torch.Tensor = sort_chunks_by_idxs(rows, sizes, order)[0]
        return moved


class StageExperts:
    """A grouped module for each stage, run one after the other.

    Args:
        modules: by stage; each takes tokens, rows by expert and probabilities.
        recompute: save the inputs only.
    """

    def __init__(self, modules: Any, per_rank: int, hidden: int, *, recompute: bool) -> None:
        self._modules, self.per_rank = modules, per_rank
        self._hidden, self._recompute = hidden, recompute

    def forward(
        self, counts: Mapping[int, Counts], packed_NW: torch.Tensor, *, save: bool
    ) -> tuple[torch.Tensor, dict[int, Saved]]:
        """See :class:`LocalExperts`."""
        outputs, saved, start = [], {}, 0
        for stage, counts_TE in counts.items():
            end = start + int(counts_TE.sum())
            one = Saved(counts_TE, *unpack(packed_NW[start:end], self._hidden, PROBS), None)
            start, graph = end, save and not self._recompute
            if save:
                one.tokens_NH.requires_grad_()
                one.probs_N.requires_grad_()
                saved[stage] = one
            # Also with no tokens at all: gradient reduction counts on every use of a weight.
            with torch.set_grad_enabled(graph):
                output_NH = self._run(stage, one)
            if graph:
                one.result = output_NH
            outputs.append(output_NH.detach())
        return torch.cat(outputs), saved

    def backward(self, saved: Mapping[int, Saved], grad_NH: torch.Tensor) -> torch.Tensor:
        """See :class:`LocalExperts`."""
        back, start = [], 0
        for stage, one in saved.items():
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

    def _run(self, stage: int, one: Saved) -> torch.Tensor:
        order = Order([one.counts_TE])
        output_NH, _ = self._modules[stage](
            order.by_expert(one.tokens_NH), one.counts_TE.sum(axis=0), order.by_expert(one.probs_N)
        )
        return order.by_source(output_NH)


class SpanExperts(MegatronModule):
    """Experts of global layers s * layers_per_stage + local layer, for every stage s.

    One grouped module holds them all, ordered by stage, where its products can be replayed
    (torch's kernels); else there is one module for each stage. Checkpoints are the same.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        builder: Any,
        stages: int,
        recompute: bool,
        pg_collection: Any,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.stages = stages
        self.local: LocalExperts
        if replays(builder):
            self.merged = builder(stages * num_local_experts, config, pg_collection=pg_collection)
            # The activation between the products is recomputed in any case, and never saved.
            self.merged.activation_recompute = False
            # Gradients of probabilities on the input need its values, which a replay lacks.
            recompute = recompute or config.moe_apply_probs_on_input
            self.local = MergedExperts(
                self.merged, stages, num_local_experts, config.hidden_size, recompute=recompute
            )
        else:
            self.by_stage = torch.nn.ModuleList(
                builder(num_local_experts, config, pg_collection=pg_collection)
                for _ in range(stages)
            )
            self.local = StageExperts(
                self.by_stage, num_local_experts, config.hidden_size, recompute=recompute
            )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Keys by global layer and expert, the same as with ``placement=stage``."""
        ((axis, layer, layers),) = sharded_offsets
        per_stage = layers // self.stages
        places = [
            ((axis, stage * per_stage + layer % per_stage, layers),) for stage in range(self.stages)
        ]
        if not hasattr(self, "by_stage"):
            return _under(prefix, "merged", self.merged.sharded_parts(prefix, places))
        state: dict[str, Any] = {}
        modules: list[Any] = list(self.by_stage)
        for stage, experts in enumerate(modules):
            part = experts.sharded_state_dict(prefix, places[stage], metadata)
            state.update(_under(prefix, f"by_stage.{stage}", part))
        return state


def replays(builder: Any) -> bool:
    """Whether a provider's builder of grouped experts makes modules that can be replayed."""
    return getattr(getattr(builder, "func", builder), "replays", False)


def _under(prefix: str, module: str, state: dict[str, Any]) -> dict[str, Any]:
    """Names of a submodule's own state."""
    assert all(name.startswith(prefix) for name in state)
    return {f"{prefix}{module}.{name[len(prefix) :]}": value for name, value in state.items()}
