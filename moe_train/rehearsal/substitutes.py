"""Operations that torch has for CUDA only, in terms of the CPU's.

torch itself chooses among kernels of attention, as on a GPU of compute capability 9.0: shapes,
dtypes, strides and grouped heads are judged by its own rules. Their values are those of the CPU's
flash kernel; those of the fused norm are the values of torch's own composition on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten
_kernel = aten._scaled_dot_product_flash_attention_for_cpu
_gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward

Scale = float | None


def _forward(q: Any, k: Any, v: Any, causal: bool, scale: Scale) -> tuple[Any, Any]:
    out, logsumexp = _kernel(q, k, v, 0.0, causal, scale=scale)
    return out, logsumexp


def _backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, causal: bool, scale: Scale
) -> tuple[Any, ...]:
    gradients: tuple[Any, ...] = _gradients(grad, q, k, v, out, logsumexp, 0.0, causal, scale=scale)
    return gradients


def _nothing() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64)


def _flash(
    q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, debug: bool = False,
    *, scale: Scale = None,
) -> tuple[Any, ...]:  # fmt: skip
    assert not dropout and not debug
    out, logsumexp = _forward(q, k, v, causal, scale)
    return out, logsumexp, None, None, q.shape[-2], k.shape[-2], *(_nothing() for _ in range(3))


def _flash_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, cum_q: Any, cum_k: Any,
    max_q: int, max_k: int, dropout: float, causal: bool, seed: Any, offset: Any,
    *, scale: Scale = None,
) -> tuple[Any, ...]:  # fmt: skip
    return _backward(grad, q, k, v, out, logsumexp, causal, scale)


def _efficient(
    q: Any, k: Any, v: Any, bias: Any, keep: bool, dropout: float = 0.0, causal: bool = False,
    *, scale: Scale = None,
) -> tuple[Any, ...]:  # fmt: skip
    assert not dropout and bias is None
    return *_forward(q, k, v, causal, scale), _nothing(), _nothing()


def _efficient_backward(
    grad: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, logsumexp: Any, seed: Any,
    offset: Any, dropout: float, mask: Any, causal: bool = False, *, scale: Scale = None,
) -> tuple[Any, ...]:  # fmt: skip
    return *_backward(grad, q, k, v, out, logsumexp, causal, scale), None


def _cudnn(
    q: Any, k: Any, v: Any, bias: Any, keep: bool, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: Scale = None,
) -> tuple[Any, ...]:  # fmt: skip
    assert bias is None
    return _flash(q, k, v, dropout, causal, debug, scale=scale)


def _cudnn_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, logsumexp: Any, seed: Any, offset: Any,
    bias: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int, dropout: float, causal: bool,
    *, scale: Scale = None,
) -> tuple[Any, ...]:  # fmt: skip
    return _backward(grad, q, k, v, out, logsumexp, causal, scale)


def _rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    shape: list[int],
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    mask: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """In the order of autograd's steps through ``x * rsqrt(mean(x^2) + eps) * weight``."""
    dims = list(range(-len(shape), 0))
    wide, upward = x.float(), grad.float()
    dweight = None
    if weight is not None:
        if mask[1]:
            dweight = (upward * (wide * rstd)).sum_to_size(weight.shape).to(weight.dtype)
        upward = upward * weight
    drstd = (upward * wide).sum(dims, keepdim=True)
    dmean = -0.5 * drstd * rstd.pow(3)
    count = x[(0,) * (x.dim() - len(shape))].numel()
    dx = upward * rstd + (dmean.expand(x.shape) / count) * (wide * 2)
    return dx.to(x.dtype) if mask[0] else None, dweight


SUBSTITUTES: dict[Any, Any] = {
    aten._fused_rms_norm_backward.default: _rms_norm_backward,
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_cudnn_attention.default: _cudnn,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
}
"""Operation of CUDA -> the same on the CPU."""
