"""The protocol of a backend: device, kernels and Megatron fields of one kind of machine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from megatron.core.models.backends import BackendSpecProvider

    from moe_train.config.kernels import KernelChoice


class Backend(Protocol):
    """One kind of machine. Built by :func:`moe_train.backend.select.select_backend`."""

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
        """Megatron module classes for this machine."""

    def transformer_overrides(self) -> dict[str, Any]:
        """TransformerConfig fields that this machine fixes (fusions it has or lacks)."""

    def finish_model(self, chunk: torch.nn.Module) -> None:
        """Switch on what Megatron's config cannot, in a model chunk just built."""

    def optimizer_overrides(self) -> dict[str, Any]:
        """OptimizerConfig fields that this machine fixes."""

    def optimizer_construction(self) -> AbstractContextManager[None]:
        """Context in which Megatron's OptimizerConfig is constructed."""

    def devices(self, world: int) -> int:
        """Devices behind ``world`` ranks: what a peak rate is multiplied by."""

    def peak_memory_bytes(self) -> int:
        """Peak memory of this process: device allocator's, or resident set on a CPU."""

    def synchronize(self) -> None:
        """Wait until queued device work is done."""
