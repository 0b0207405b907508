"""Tokens and their probabilities in one buffer, so that one all-to-all carries both.

Shape letters: N tokens, H hidden width, W width of the packed row.
"""

from __future__ import annotations

import torch


def pack(tokens_NH: torch.Tensor, probs_N: torch.Tensor) -> torch.Tensor:
    """Rows of tokens with their probability's bytes appended, [N, W], in the tokens' dtype."""
    return torch.cat([tokens_NH, probs_N.unsqueeze(1).view(tokens_NH.dtype)], dim=1)


def unpack(packed_NW: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N, H] and probabilities [N] of ``dtype`` from :func:`pack`'s buffer."""
    tail = width(0, packed_NW.dtype, dtype)
    hidden = packed_NW.shape[1] - tail
    # clone, not contiguous(): a single row counts as contiguous whatever its stride, and the
    # grouped product wants aligned strides.
    tokens_NH = packed_NW[:, :hidden].clone(memory_format=torch.contiguous_format)
    tail_NW = packed_NW[:, hidden:].clone(memory_format=torch.contiguous_format)
    probs_N = tail_NW.view(dtype).squeeze(1)
    return tokens_NH, probs_N


def width(hidden: int, tokens: torch.dtype, probs: torch.dtype) -> int:
    """Width W of a packed row."""
    return hidden + probs.itemsize // tokens.itemsize
