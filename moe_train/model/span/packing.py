"""Tokens and their probabilities in one buffer, so that one all-to-all carries both.

Rows are padded to 16 bytes: each peer's part of the buffer starts at a multiple of the row, and
NCCL moves 16 bytes at a time only where both ends are aligned to them, else one (``reduceCopy`` in
its ``common_kernel.h``). A bf16 row of hidden width 4608 would have 9,220 bytes without.

Shape letters: N tokens, H hidden width, W width of the packed row.
"""

from __future__ import annotations

import torch

ALIGNMENT = 16
"""Bytes that a row is a multiple of."""


def pack(tokens_NH: torch.Tensor, probs_N: torch.Tensor) -> torch.Tensor:
    """Rows of tokens, their probability's bytes and zeros, [N, W], in the tokens' dtype."""
    rows, hidden = tokens_NH.shape
    tail = probs_N.unsqueeze(1).view(tokens_NH.dtype)
    filling = width(hidden, tokens_NH.dtype, probs_N.dtype) - hidden - tail.shape[1]
    padding = tokens_NH.new_zeros(1, filling).expand(rows, filling)
    return torch.cat([tokens_NH, tail, padding], dim=1)


def unpack(
    packed_NW: torch.Tensor, hidden: int, dtype: torch.dtype, *, copy: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N, H] and probabilities [N] of ``dtype`` from :func:`pack`'s buffer.

    Args:
        copy: tokens are copied; a view of the buffer otherwise.
    """
    tokens_NH = packed_NW[:, :hidden]
    if copy:
        # clone, not contiguous(): a single row counts as contiguous whatever its stride, and the
        # grouped product wants aligned strides.
        tokens_NH = tokens_NH.clone(memory_format=torch.contiguous_format)
    end = hidden + dtype.itemsize // packed_NW.dtype.itemsize
    tail_NW = packed_NW[:, hidden:end].clone(memory_format=torch.contiguous_format)
    return tokens_NH, tail_NW.view(dtype).squeeze(1)


def width(hidden: int, tokens: torch.dtype, probs: torch.dtype) -> int:
    """Width W of a packed row."""
    size = hidden * tokens.itemsize + probs.itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT // tokens.itemsize
