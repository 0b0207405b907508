"""Megatron's ``BackendSpecProvider`` for the host."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules

from moe_train.backend.host.attention import HostAttention
from moe_train.backend.host.grouped import (
    HostColumnGroupedLinear,
    HostGroupedMLP,
    HostRowGroupedLinear,
)
from moe_train.backend.host.norm import HostNorm


class HostSpecProvider(LocalSpecProvider):
    """Megatron's local linear layers with host norms, attention and grouped experts."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        """Norms that accept sequence parallelism."""
        return HostNorm

    def core_attention(self) -> type:
        """Attention on torch's fused kernel."""
        return HostAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Experts on ``torch._grouped_mm``."""
        return partial(
            HostGroupedMLP,
            submodules=GroupedMLPSubmodules(
                linear_fc1=HostColumnGroupedLinear, linear_fc2=HostRowGroupedLinear
            ),
        )
