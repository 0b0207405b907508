"""All-to-all that sends rows in bf16, whatever the compute dtype; not the probabilities."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class CompressedDispatcher(MoEAlltoAllTokenDispatcher):  # type: ignore[misc]
    """Megatron's dispatcher between two casts; autograd casts the gradients likewise."""

    def token_dispatch(self, rows: torch.Tensor, probs: torch.Tensor) -> Any:
        """Rows [N K, H] out to their experts."""
        sent, probs = super().token_dispatch(rows.bfloat16(), probs)
        return sent.to(rows.dtype), probs

    def token_combine(self, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Results back to the ranks of their tokens."""
        return super().token_combine(rows.bfloat16(), *args, **kwargs).to(rows.dtype)


class CompressedMoELayer(MoELayer):  # type: ignore[misc]
    """Megatron's MoE layer with the dispatcher above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.token_dispatcher = CompressedDispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            config=self.config,
            pg_collection=kwargs["pg_collection"],
        )
