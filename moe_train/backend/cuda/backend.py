"""The CUDA backend: one GPU per rank, NCCL, TransformerEngine; Megatron unpatched."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from moe_train.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider

# Apex's kernel, with which Megatron's own linear layers add weight gradients in place.
WEIGHT_GRADIENT_KERNEL = "fused_weight_gradient_mlp_cuda"


class CudaBackend:
    """See :class:`moe_train.backend.protocol.Backend`."""

    name = "cuda"
    communication = "nccl"
    transformer_impl = "transformer_engine"

    def __init__(self, local_rank: int) -> None:
        self._local_rank = local_rank

    @property
    def device(self) -> torch.device:
        """The GPU of this local rank."""
        return torch.device("cuda", self._local_rank)

    def prepare(self) -> None:
        """Take the GPU and see that its kernels are there.

        Raises:
            ConfigError: TransformerEngine is not installed.
        """
        torch.cuda.set_device(self.device)
        require_transformer_engine()

    def spec_provider(self) -> BackendSpecProvider:
        """TransformerEngine's modules."""
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()

    def transformer_overrides(self) -> dict[str, Any]:
        """Fused kernels on, as far as they are installed and stable."""
        return {
            "transformer_impl": "transformer_engine",
            "apply_rope_fusion": True,
            # Without Apex, Megatron refuses to construct the head with it.
            "gradient_accumulation_fusion": importlib.util.find_spec(WEIGHT_GRADIENT_KERNEL)
            is not None,
            # TransformerEngine's own is unstable by Megatron's word, which warns of it.
            "cross_entropy_fusion_impl": "native",
        }

    def optimizer_overrides(self) -> dict[str, Any]:
        """Offloading means all of the state: Megatron's dataclass would offload a share of 0.

        Master weights are stored whole, as on the host: of 16-bit remainders, which Megatron
        stores by default, a checkpoint could not make a master weight again.
        """
        return {"optimizer_offload_fraction": 1.0, "store_param_remainders": False}

    def optimizer_construction(self) -> contextlib.AbstractContextManager[None]:
        """TransformerEngine is there: nothing to arrange."""
        return contextlib.nullcontext()

    def devices(self, world: int) -> int:
        """One GPU per rank."""
        return world

    def peak_memory_bytes(self) -> int:
        """Peak of the caching allocator on this device."""
        return torch.cuda.max_memory_allocated(self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)


def require_transformer_engine() -> None:
    """Import TransformerEngine, so that its absence is told before any group or model exists.

    Raises:
        ConfigError: it does not import.
    """
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError as missing:
        raise ConfigError(
            "device",
            f"cuda needs TransformerEngine, which does not import: {missing}",
            "install the gpu extra (EXTRAS=dev,gpu make setup) or use the Dockerfile",
        ) from missing
