"""RMSNorm of queries or keys over all heads together (OLMoE), split over tensor-parallel ranks.

Letters: S sequence, B batch, h heads of this rank, H heads of all ranks, D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moe_train.backend.torch_kernels.devices import weight_device

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class _FullWidthRMSNorm(torch.autograd.Function):
    """y = w x r with r = (sum of x^2 over all ranks / width + eps)^-1/2, computed in fp32.

    Every rank's part of a token depends on every other's through r, so that the sum is reduced
    in the forward pass and its gradient in the backward pass. Saves x and r.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SBhD: torch.Tensor,
        weight_hD: torch.Tensor,
        group: dist.ProcessGroup | None,
        width: int,
        eps: float,
    ) -> torch.Tensor:
        x = x_SBhD.float()
        squares_SB = _reduce(x.square().sum((-2, -1)), group)
        scale_SB = torch.rsqrt(squares_SB / width + eps)
        ctx.save_for_backward(x_SBhD, weight_hD, scale_SB)
        ctx.group, ctx.width = group, width
        return (x * scale_SB[..., None, None] * weight_hD.float()).to(x_SBhD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_SBhD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_SBhD, weight_hD, scale_SB = ctx.saved_tensors
        x, grad, scale = x_SBhD.float(), grad_SBhD.float(), scale_SB[..., None, None]
        weighted = grad * weight_hD.float()
        products_SB = _reduce((weighted * x).sum((-2, -1)), ctx.group)
        correction = (scale_SB.pow(3) * products_SB / ctx.width)[..., None, None]
        x_grad = weighted * scale - x * correction
        weight_grad = (grad * x * scale).sum((0, 1))
        return x_grad.to(x_SBhD.dtype), weight_grad.to(weight_hD.dtype), None, None, None


def _reduce(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


class FullWidthNorm(torch.nn.Module):
    """RMSNorm over the width of all heads, of which a rank holds some.

    The weight is whole on every rank, so that a checkpoint has it whole in every layout; a rank's
    gradient is that of its heads, and Megatron sums gradients of the q and k norms over the
    tensor-parallel ranks (``finalize_model_grads``).

    Args:
        config: Megatron's.
        heads: H, of queries or of keys.
        group: the tensor-parallel ranks. With fewer key heads than ranks several ranks hold the
            same head.
        hidden_size: D; Megatron passes it by this name.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        heads: int,
        group: dist.ProcessGroup | None,
        hidden_size: int,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        ranks = group.size() if group is not None else 1
        rank = group.rank() if group is not None else 0
        self._group, self._eps, self._heads = group, eps, heads
        self._begin = rank * heads // ranks
        self._end = self._begin + max(heads // ranks, 1)
        # Each head's squares are summed as often as there are ranks that hold it.
        self._width = heads * hidden_size * max(ranks // heads, 1)
        self.weight = torch.nn.Parameter(
            torch.ones(heads * hidden_size, dtype=config.params_dtype, device=weight_device(config))
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBhD: torch.Tensor) -> torch.Tensor:
        """Normalised queries or keys of this rank's heads, in the dtype of ``x_SBhD``."""
        weight_hD = self.weight.view(self._heads, -1)[self._begin : self._end]
        normed: torch.Tensor = _FullWidthRMSNorm.apply(
            x_SBhD, weight_hD, self._group, self._width, self._eps
        )
        return normed
