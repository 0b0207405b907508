"""The protocol of a backend: device, kernels and Megatron fields of one kind of machine."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from megatron.core.models.backends import BackendSpecProvider

    from moe_train.config.kernels import KernelChoice


class Backend(Protocol):
    """One kind of machine. Built by :func:`moe_train.backend.select.select_backend`.

    What depends on the kernel set alone is implemented here.
    """

    name: str
    """``cpu`` or ``cuda``."""
    communication: str
    """torch.distributed backend name."""
    kernels: KernelChoice
    """The kernel set and the reason; on a GPU final once :meth:`prepare` has run."""

    @property
    def device(self) -> torch.device:
        """Device that holds this rank's tensors."""

    def prepare(self) -> None:
        """Set up the process (environment, threads, patches) before Megatron is imported."""

    def spec_provider(self) -> BackendSpecProvider:
        """Megatron module classes of the kernel set."""
        if self.kernels.kernels.name == "torch":
            from moe_train.backend.torch_kernels.provider import TorchSpecProvider

            return TorchSpecProvider()
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()

    def transformer_overrides(self) -> dict[str, Any]:
        """TransformerConfig fields that this machine fixes (fusions it has or lacks)."""

    def finish_model(self, chunk: torch.nn.Module) -> None:
        """Let TransformerEngine's layers add weight gradients to the buffer themselves.

        They read their own attribute at every forward pass; Megatron's config, from which it came,
        also governs the head, which can do so with Apex alone.
        """
        if self.kernels.kernels.overrides()["gradient_accumulation_fusion"]:
            for module in chunk.modules():
                if hasattr(module, "fuse_wgrad_accumulation"):
                    module.fuse_wgrad_accumulation = True  # type: ignore[assignment]

    def optimizer_overrides(self) -> dict[str, Any]:
        """OptimizerConfig fields that this machine fixes.

        Master weights are stored whole: of 16-bit remainders, which Megatron stores by default, a
        checkpoint could not recover a master weight, and TorchAdam has none.
        """
        return {"store_param_remainders": False}

    def optimizer_construction(self) -> contextlib.AbstractContextManager[None]:
        """Context for Megatron's OptimizerConfig, which looks for a FusedAdam."""
        if self.kernels.kernels.name == "torch":
            from moe_train.backend.patches import fused_adam_visible

            return fused_adam_visible()
        return contextlib.nullcontext()

    def devices(self, world: int) -> int:
        """Devices behind ``world`` ranks: what a peak rate is multiplied by."""

    def peak_memory_bytes(self) -> int:
        """Peak memory of this process: device allocator's, or resident set on a CPU."""

    def synchronize(self) -> None:
        """Wait until queued device work is done."""
