"""RMSNorm and LayerNorm that know about sequence parallelism.

Megatron's ``WrappedTorchNorm`` refuses sequence parallelism, which MoE with tensor parallelism
needs; all it takes is to mark the weights, whose gradients Megatron then sums over the
tensor-parallel group (``finalize_model_grads``).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


def weight_device(config: TransformerConfig) -> Any:
    """Where Megatron's own layers allocate their weights."""
    return None if config.use_cpu_initialization else torch.cuda.current_device()


class TorchNorm:
    """Builder with Megatron's ``LayerNormBuilder`` signature; returns a torch norm module."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype, device=weight_device(config))
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
