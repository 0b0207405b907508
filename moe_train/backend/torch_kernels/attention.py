"""Core attention on torch's scaled_dot_product_attention.

Shape letters: S sequence, B batch, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention


class TorchAttention(torch.nn.Module):
    """Causal (or full) attention with Megatron's ``DotProductAttention`` interface."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        head_dim = config.kv_channels
        assert head_dim is not None
        self.scale = softmax_scale or 1.0 / math.sqrt(head_dim)
        self.attn_mask_type = attn_mask_type

    def forward(
        self,
        query_SBHD: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Return the context, [S, B, H * D]."""
        assert packed_seq_params is None and attention_mask is None
        q_BHSD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (query_SBHD, key_SBGD, value_SBGD))
        out_BHSD = scaled_dot_product_attention(
            q_BHSD,
            k_BGSD,
            v_BGSD,
            attn_mask=attention_bias,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=(attn_mask_type or self.attn_mask_type) == AttnMaskType.causal,
            scale=self.scale,
            enable_gqa=q_BHSD.size(1) != k_BGSD.size(1),
        )
        return out_BHSD.permute(2, 0, 1, 3).flatten(2)
