"""RMSNorm and LayerNorm that know about sequence parallelism.

Megatron's ``WrappedTorchNorm`` refuses sequence parallelism, which MoE with tensor parallelism
needs; all it takes is to mark the weights, whose gradients Megatron then sums over the
tensor-parallel group (``finalize_model_grads``).
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class TorchNorm:
    """Builder with Megatron's ``LayerNormBuilder`` signature; returns a torch norm module."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
