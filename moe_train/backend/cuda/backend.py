"""The CUDA backend: one GPU per rank, NCCL, TransformerEngine's kernels or torch's."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from moe_train.backend import patches
from moe_train.backend.kernels import choose_kernels
from moe_train.backend.protocol import Backend
from moe_train.config.kernels import KernelChoice, expected_kernels
from moe_train.config.training import BackendConfig

# Apex's kernel, with which Megatron's own linear layers add weight gradients in place.
WEIGHT_GRADIENT_KERNEL = "fused_weight_gradient_mlp_cuda"


class CudaBackend(Backend):
    """GPUs and NCCL; Megatron is unpatched with TransformerEngine's kernels."""

    name = "cuda"
    communication = "nccl"

    def __init__(self, index: int, config: BackendConfig | None = None) -> None:
        self._index = index
        self._config = config or BackendConfig()
        self.kernels: KernelChoice = expected_kernels(self._config.kernels, on_cpu=False)

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, as `moe_train.backend.select` chose it."""
        return torch.device("cuda", self._index)

    def prepare(self) -> None:
        """Take the GPU, choose the kernels and import Megatron for them.

        Raises:
            ConfigError: ``backend.kernels=te`` and TransformerEngine does not import.
        """
        torch.cuda.set_device(self.device)
        self.kernels = choose_kernels(self._config, on_cpu=False)
        compiled = self._config.compile
        if self.kernels.kernels.name == "torch":
            patches.apply_missing_te(lean=not compiled)
        elif compiled is False:
            patches.import_megatron_uncompiled()

    def transformer_overrides(self) -> dict[str, Any]:
        """Fused kernels on, as far as the kernel set has them."""
        overrides = self.kernels.kernels.overrides()
        if importlib.util.find_spec(WEIGHT_GRADIENT_KERNEL) is None:
            # Megatron's head would refuse to be built; TransformerEngine's layers need no Apex
            # for it and are switched on in finish_model.
            overrides["gradient_accumulation_fusion"] = False
        return overrides

    def optimizer_overrides(self) -> dict[str, Any]:
        """Offloading means all of the state: Megatron's dataclass would offload a share of 0."""
        return {**super().optimizer_overrides(), "optimizer_offload_fraction": 1.0}

    def devices(self, world: int) -> int:
        """One GPU per rank."""
        return world

    def peak_memory_bytes(self) -> int:
        """Peak of the caching allocator on this device."""
        return torch.cuda.max_memory_allocated(self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)
