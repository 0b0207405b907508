"""The choice of the next token from logits. Shape letters: B sequences, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moe_train.inference.request import Sampling


def filtered(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits after temperature, top-k and top-p; -inf for what is left out, [B, V]."""
    scores_BV = logits_BV.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores_BV.size(1):
        least_B1 = scores_BV.topk(sampling.top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = scores_BV.sort(dim=1, descending=True, stable=True)
        probabilities_BV = sorted_BV.softmax(dim=1)
        # What comes before a token already has the probability: it is not needed any more.
        before_BV = probabilities_BV.cumsum(dim=1) - probabilities_BV
        dropped_BV = before_BV >= sampling.top_p
        dropped_BV[:, 0] = False
        scores_BV = scores_BV.masked_fill(
            torch.zeros_like(dropped_BV).scatter(1, order_BV, dropped_BV), -math.inf
        )
    return scores_BV


def choose(
    logits_BV: torch.Tensor, sampling: Sampling, places: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """The next token of each sequence, [B].

    Args:
        places: index of the prompt and position of the new token, of each sequence.
    """
    if sampling.greedy:
        return logits_BV.argmax(dim=1)
    cumulative_BV = filtered(logits_BV, sampling).softmax(dim=1).cumsum(dim=1)
    draws_B1 = cumulative_BV.new_tensor([[sampling.draw(*place)] for place in places])
    # Rounding leaves the sum a little off 1, and a draw must not land behind the last token.
    wanted_B1 = draws_B1 * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, wanted_B1, right=True).squeeze(1)
