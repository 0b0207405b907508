"""Megatron's ``BackendSpecProvider`` for torch's kernels, on CPU and GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules

from moe_train.backend.torch_kernels.attention import TorchAttention
from moe_train.backend.torch_kernels.grouped import (
    TorchColumnGroupedLinear,
    TorchGroupedMLP,
    TorchRowGroupedLinear,
)
from moe_train.backend.torch_kernels.norm import TorchNorm


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
