"""The expert side: run a stage's tokens through the experts hosted here, and back.

Shape letters: N tokens, H hidden width, T source ranks of a stage (its tensor-parallel size),
E experts of a layer hosted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from numpy.typing import NDArray


@dataclass
class Hosted:
    """One stage's tokens of one micro-batch and layer, kept until that stage comes back."""

    counts_TE: NDArray[np.int64]
    tokens_NH: torch.Tensor
    probs_N: torch.Tensor
    output_NH: torch.Tensor | None
    """None where the experts are recomputed in the backward pass."""

    @property
    def rows(self) -> list[int]:
        """Tokens from each source rank of the stage."""
        rows: list[int] = self.counts_TE.sum(axis=1).tolist()
        return rows


def host_forward(
    experts: Any,
    counts_TE: NDArray[np.int64],
    tokens_NH: torch.Tensor,
    probs_N: torch.Tensor,
    *,
    keep: bool,
    recompute: bool,
) -> tuple[torch.Tensor, Hosted | None]:
    """Run one stage's tokens through ``experts``.

    Args:
        counts_TE: tokens by source rank and expert; rows come in that order.
        keep: a backward pass will follow.
        recompute: keep the inputs only.

    Returns:
        Results [N, H] in the order of the inputs, and what the backward pass needs.
    """
    if not keep:
        with torch.no_grad():
            return _run(experts, counts_TE, tokens_NH, probs_N), None
    hosted = Hosted(counts_TE, tokens_NH.requires_grad_(), probs_N.requires_grad_(), None)
    if recompute:
        with torch.no_grad():
            return _run(experts, counts_TE, tokens_NH, probs_N), hosted
    with torch.enable_grad():
        hosted.output_NH = _run(experts, counts_TE, tokens_NH, probs_N)
    return hosted.output_NH.detach(), hosted


def host_backward(
    experts: Any, hosted: Hosted, grad_NH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the tokens [N, H] and probabilities [N]; weights accumulate theirs."""
    output_NH = hosted.output_NH
    if output_NH is None:
        with torch.enable_grad():
            output_NH = _run(experts, hosted.counts_TE, hosted.tokens_NH, hosted.probs_N)
    torch.autograd.backward(output_NH, grad_NH)
    assert hosted.tokens_NH.grad is not None and hosted.probs_N.grad is not None
    return hosted.tokens_NH.grad, hosted.probs_N.grad


def _run(
    experts: Any, counts_TE: NDArray[np.int64], tokens_NH: torch.Tensor, probs_N: torch.Tensor
) -> torch.Tensor:
    sources, hosted = counts_TE.shape
    by_source = np.arange(sources * hosted).reshape(sources, hosted)
    if sources > 1:
        tokens_NH, probs = sort_chunks_by_idxs(
            tokens_NH, counts_TE.ravel(), by_source.T.ravel(), probs=probs_N
        )
        assert probs is not None
        probs_N = probs
    output_NH, _ = experts(tokens_NH, counts_TE.sum(axis=0), probs_N)
    if sources > 1:
        by_expert = np.arange(sources * hosted).reshape(hosted, sources)
        output_NH, _ = sort_chunks_by_idxs(output_NH, counts_TE.T.ravel(), by_expert.T.ravel())
    return output_NH
