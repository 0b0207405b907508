"""What the routers did in a step: tokens per expert, drops, auxiliary losses.

Shape letters: L layers, E experts, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import (
    destroy_moe_metrics_tracker,
    get_moe_metrics_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter


@dataclass(frozen=True)
class RoutingStats:
    """Totals over all ranks and micro-batches of one step."""

    tokens_LE: torch.Tensor
    """Tokens that each expert accepted, [layers, experts]."""
    dropped: int
    """Token-to-expert assignments dropped for capacity, over all layers."""
    aux_loss: float
    """Weighted load-balancing loss, mean over layers and micro-batches."""
    z_loss: float
    """Router z-loss, mean over layers and micro-batches."""

    @property
    def load_imbalance(self) -> float:
        """Busiest expert over the mean expert, mean over layers; 1 is even."""
        mean_L = self.tokens_LE.mean(dim=1).clamp(min=1e-9)
        return float((self.tokens_LE.amax(dim=1) / mean_L).mean())


class RoutingRecorder:
    """Counts on this rank, through forward hooks on Megatron's routers.

    Counts stay on the routers' device until the end of the step: no synchronisation per layer.

    A layer that is recomputed runs its router twice, once without gradients, so only calls
    with gradients enabled count; validation, without gradients, never does.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        layers: int,
        experts: int,
        device: torch.device,
    ) -> None:
        self._tokens_LE = torch.zeros(layers, experts, dtype=torch.float64, device=device)
        self._routed = 0
        # Megatron's is global and keeps the number of layers of the first model of a process.
        destroy_moe_metrics_tracker()
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: TopKRouter, inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        map_NE = output[1]
        assert router.layer_number is not None
        self._tokens_LE[router.layer_number - 1] += map_NE.sum(dim=0)
        self._routed += map_NE.shape[0] * router.topk

    def vector(self, data_size: int) -> torch.Tensor:
        """This rank's share, flat float64: sums over all ranks give the totals.

        Args:
            data_size: data-parallel size, over which Megatron averages some losses.
        """
        losses = {"aux": 0.0, "z": 0.0}
        for name, entry in get_moe_metrics_tracker().metrics.items():
            share = 1.0
            if entry.avg_group is not None:
                share /= entry.avg_group.size()
            elif entry.needs_dp_avg:
                share /= data_size
            kind = "z" if name == "z_loss" else "aux"
            losses[kind] += float(entry.values.sum()) * share
        tokens_LE = self._tokens_LE.cpu()
        dropped = self._routed - float(tokens_LE.sum())
        head = torch.tensor([dropped, losses["aux"], losses["z"]], dtype=torch.float64)
        return torch.cat([head, tokens_LE.flatten()])

    def stats(self, summed: torch.Tensor, microbatches: int) -> RoutingStats:
        """Totals from the world's sum of :meth:`vector`.

        Args:
            microbatches: micro-batches per replica, over which losses were accumulated.
        """
        tokens_LE = summed[3:].view_as(self._tokens_LE)
        scale = 1.0 / (microbatches * self._tokens_LE.shape[0])
        dropped, aux, z = summed[:3].tolist()
        return RoutingStats(tokens_LE, round(dropped), aux * scale, z * scale)

    def clear(self) -> None:
        """Start the next step."""
        self._tokens_LE.zero_()
        self._routed = 0
        get_moe_metrics_tracker().clear()
