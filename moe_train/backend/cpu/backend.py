"""The CPU backend: CPU tensors, gloo, Megatron patched where it asks for CUDA."""

from __future__ import annotations

import os
import resource
from typing import Any

import torch

from moe_train.backend import patches
from moe_train.backend.kernels import choose_kernels
from moe_train.backend.protocol import Backend
from moe_train.config.training import BackendConfig


class CpuBackend(Backend):
    """A CPU and gloo; Megatron is patched."""

    name = "cpu"
    communication = "gloo"

    def __init__(self, config: BackendConfig) -> None:
        self._threads = config.cpu_threads
        self.kernels = choose_kernels(config, on_cpu=True)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def prepare(self) -> None:
        """Fix threads and determinism, then patch."""
        torch.set_num_threads(self._threads)
        # The same switch as use_deterministic_algorithms, which would import the compiler.
        torch.set_deterministic_debug_mode("error")
        # Determinism would otherwise fill every empty() with NaN, which costs bandwidth.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        patches.hide_transformer_engine()
        patches.apply_missing_cuda()
        patches.apply_missing_te()

    def transformer_overrides(self) -> dict[str, Any]:
        """Torch's kernels; there is no device to wait for after a batch of sends."""
        return {**self.kernels.kernels.overrides(), "batch_p2p_sync": False}

    def devices(self, world: int) -> int:
        """Ranks of one thread share the cores."""
        return min(world * self._threads, os.cpu_count() or 1)

    def peak_memory_bytes(self) -> int:
        """Peak resident set of this process."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def synchronize(self) -> None:
        """CPU work is done when it returns."""
