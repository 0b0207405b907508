"""The CUDA backend: one GPU per rank, NCCL, TransformerEngine; Megatron unpatched."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import torch

from moe_train.config.training import BackendConfig
from moe_train.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider


class CudaBackend:
    """See :class:`moe_train.backend.protocol.Backend`."""

    name = "cuda"
    communication = "nccl"
    transformer_impl = "transformer_engine"

    def __init__(self, config: BackendConfig, local_rank: int) -> None:
        self._config, self._local_rank = config, local_rank

    @property
    def device(self) -> torch.device:
        """The GPU of this local rank."""
        return torch.device("cuda", self._local_rank)

    def prepare(self) -> None:
        """Set the environment that CUDA and NCCL read once, then take the GPU."""
        connections = str(self._config.cuda_device_max_connections)
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", connections)
        for name, value in self._config.nccl.items():
            os.environ.setdefault(f"NCCL_{name.upper()}", str(value))
        torch.cuda.set_device(self.device)

    def spec_provider(self) -> BackendSpecProvider:
        """TransformerEngine's modules.

        Raises:
            ConfigError: TransformerEngine is not installed.
        """
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError as missing:
            raise ConfigError(
                "device",
                f"cuda needs TransformerEngine, which does not import: {missing}",
                "install the gpu extra (pip install -e '.[gpu]') or use the Dockerfile",
            ) from missing
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()

    def transformer_overrides(self) -> dict[str, Any]:
        """Fused kernels on."""
        return dict(transformer_impl="transformer_engine", apply_rope_fusion=True)

    def optimizer_overrides(self) -> dict[str, Any]:
        """Nothing to fix."""
        return {}

    def optimizer_construction(self) -> contextlib.AbstractContextManager[None]:
        """TransformerEngine is there: nothing to arrange."""
        return contextlib.nullcontext()

    def peak_memory_bytes(self) -> int:
        """Peak of the caching allocator on this device."""
        return torch.cuda.max_memory_allocated(self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)
