"""The matrix products of grouped experts, with a backward pass of their own.

torch differentiates ``torch._grouped_mm`` itself, on a CPU from 2.13 only, and leaves the weight
gradient of an expert without tokens to the kernel, which does not always write zeros
(pytorch#172439: compute capability 10). Which experts have no tokens is known on the host.

Shape letters: E experts, T tokens sorted by expert, I input and O output width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch

from moe_train.backend.torch_kernels.devices import device_of


def grouped_linear(
    x_TI: torch.Tensor, weight_EOI: torch.Tensor, rows_E: Sequence[int]
) -> torch.Tensor:
    """Multiply each expert's rows by its own matrix, transposed: [T, O].

    Args:
        rows_E: tokens of each expert, on the host; they add up to T.
    """
    output: torch.Tensor = _GroupedLinear.apply(x_TI, weight_EOI, tuple(rows_E))  # type: ignore[no-untyped-call]
    return output


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, weight_EOI: torch.Tensor, rows_E: tuple[int, ...]
    ) -> torch.Tensor:
        offsets = group_offsets(x_TI, rows_E)
        ctx.rows_E = rows_E
        ctx.save_for_backward(x_TI, weight_EOI, offsets)
        return output(x_TI, weight_EOI, offsets, rows_E)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, weight_EOI, offsets = ctx.saved_tensors
        grad_TO = grads[0].contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = input_gradient(grad_TO, weight_EOI, offsets, ctx.rows_E)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad_TO, x_TI, offsets, ctx.rows_E)
        return grad_x, grad_weight, None


def group_offsets(x_TI: torch.Tensor, rows_E: Sequence[int]) -> torch.Tensor | None:
    """Ends of the experts' rows on the device of ``x_TI``; None where its products are looped."""
    if not sum(rows_E) or not (device := device_of(x_TI)).grouped(x_TI):
        return None
    return device.offsets(list(accumulate(rows_E)), x_TI.device)


def output(
    x_TI: torch.Tensor,
    weight_EOI: torch.Tensor,
    offsets: torch.Tensor | None,
    rows_E: tuple[int, ...],
) -> torch.Tensor:
    """The product itself, [T, O]; ``offsets`` are :func:`group_offsets`."""
    if offsets is not None:
        return torch._grouped_mm(x_TI, weight_EOI.transpose(1, 2), offs=offsets)
    out_TO = x_TI.new_empty(x_TI.shape[0], weight_EOI.shape[1])
    for expert, rows in _slices(rows_E):
        torch.mm(x_TI[rows], weight_EOI[expert].t(), out=out_TO[rows])
    return out_TO


def _slices(rows_E: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which."""
    end = 0
    for expert, rows in enumerate(rows_E):
        if rows:
            yield expert, slice(end, end + rows)
        end += rows


def input_gradient(
    grad_TO: torch.Tensor,
    weight_EOI: torch.Tensor,
    offsets: torch.Tensor | None,
    rows_E: tuple[int, ...],
) -> torch.Tensor:
    """Gradient of the product's input, [T, I]."""
    if offsets is not None:
        return torch._grouped_mm(grad_TO, weight_EOI, offs=offsets)
    grad_TI = grad_TO.new_empty(grad_TO.shape[0], weight_EOI.shape[2])
    for expert, rows in _slices(rows_E):
        torch.mm(grad_TO[rows], weight_EOI[expert], out=grad_TI[rows])
    return grad_TI


def weight_gradient(
    grad_TO: torch.Tensor,
    x_TI: torch.Tensor,
    offsets: torch.Tensor | None,
    rows_E: tuple[int, ...],
) -> torch.Tensor:
    """Gradient of the weights, [E, O, I]; zeros for experts without rows."""
    if offsets is not None:
        grad_EOI = torch._grouped_mm(grad_TO.t(), x_TI, offs=offsets)
    else:
        grad_EOI = grad_TO.new_empty(len(rows_E), grad_TO.shape[1], x_TI.shape[1])
        for expert, rows in _slices(rows_E):
            torch.mm(grad_TO[rows].t(), x_TI[rows], out=grad_EOI[expert])
    for expert, count in enumerate(rows_E):
        if not count:
            grad_EOI[expert].zero_()
    return grad_EOI
