"""Megatron's ``BackendSpecProvider`` for torch's kernels, on CPU and GPU; its norms."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_train.backend.torch_kernels.attention import TorchAttention
from moe_train.backend.torch_kernels.devices import weight_device
from moe_train.backend.torch_kernels.grouped import (
    TorchColumnGroupedLinear,
    TorchGroupedMLP,
    TorchRowGroupedLinear,
)


class TorchNorm:
    """RMSNorm or LayerNorm over the last axis, with Megatron's ``LayerNormBuilder`` signature.

    Megatron's ``WrappedTorchNorm`` refuses sequence parallelism, which MoE with tensor parallelism
    needs. All it takes is to mark the weights, whose gradients Megatron then sums over the
    tensor-parallel group (``finalize_model_grads``).
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype, device=weight_device(config))
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class TorchSpecProvider(LocalSpecProvider):
    """Megatron's local linear layers with torch's norms, attention and grouped experts."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        """Norms that accept sequence parallelism."""
        return TorchNorm

    def core_attention(self) -> type:
        """Attention on torch's fused kernel."""
        return TorchAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Experts on grouped products."""
        return partial(
            TorchGroupedMLP,
            submodules=GroupedMLPSubmodules(
                linear_fc1=TorchColumnGroupedLinear, linear_fc2=TorchRowGroupedLinear
            ),
        )
