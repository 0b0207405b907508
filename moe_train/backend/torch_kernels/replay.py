"""Grouped experts whose backward pass groups other rows than the forward pass did.

``placement=span`` runs the experts of several stages in one grouped product. The stages that go
forward together do not go backward together, so no autograd graph of the forward pass could be
used. Instead the forward pass runs without a graph and records the results of its first grouped
product (:func:`record`). The backward pass regroups the rows and runs Megatron's own forward code
once more (:func:`backward`), where the grouped products return the recorded results. So no product
is repeated; the activation between them is recomputed and not saved, and the second product's
result is not needed at all.

Shape letters: T rows sorted by expert, E experts of all parts, H hidden, I input, O output width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_train.backend.torch_kernels.products import (
    group_offsets,
    input_gradient,
    output,
    weight_gradient,
)

Rows = Sequence[int]


@dataclass
class Tape:
    """Records or replays the grouped products of one pass through the experts.

    Args:
        parts: equal parts of the experts; each part's weight gradient is computed separately, and
            one without rows is not touched.
        inputs: of the first product, by part with rows; None: the product's own input.
        result: of the first product; None where both are to be computed.
    """

    parts: int
    inputs: Sequence[torch.Tensor] | None = None
    result: torch.Tensor | None = None
    results: list[torch.Tensor] = field(default_factory=list)
    """Of the products that were computed."""
    replayed: int = 0

    def product(self, weight_EOI: torch.Tensor, x_TI: torch.Tensor, rows_E: Rows) -> torch.Tensor:
        """One grouped product [T, O]."""
        if self.result is None:
            made: torch.Tensor = _Product.apply(x_TI, weight_EOI, rows_E, self.parts, None, None)
            self.results.append(made)
            return made
        self.replayed += 1
        if self.replayed == 1:
            inputs, result = self.inputs, self.result
        else:
            inputs = None
            result = x_TI.new_zeros(1, 1).expand(x_TI.shape[0], weight_EOI.shape[1])
        known: torch.Tensor = _Product.apply(x_TI, weight_EOI, rows_E, self.parts, inputs, result)
        return known


@contextlib.contextmanager
def _taped(experts: Any, tape: Tape) -> Iterator[None]:
    linears = (experts.linear_fc1, experts.linear_fc2)
    for linear in linears:
        linear.tape = tape
    try:
        yield
    finally:
        for linear in linears:
            linear.tape = None


def record(
    experts: Any, x_TH: torch.Tensor, rows_E: NDArray[np.int64], probs_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the experts without a graph.

    Returns:
        Their results [T, H], and those of the first product, which :func:`backward` wants.
    """
    tape = Tape(1)
    with torch.no_grad(), _taped(experts, tape):
        made, _ = experts(x_TH, rows_E, probs_T)
    return made, tape.results[0]


def backward(
    experts: Any,
    inputs: Sequence[torch.Tensor],
    rows_E: NDArray[np.int64],
    probs_T: torch.Tensor,
    result: torch.Tensor | None,
    grad_TH: torch.Tensor,
    parts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward pass of rows that need not have gone forward together.

    Args:
        inputs: rows of each part that has any.
        probs_T: their probabilities.
        result: the first product's, of all rows; None runs both products again.
        parts: equal parts of the experts.

    Returns:
        Gradients of inputs [T, H] and probabilities [T]. Weights get theirs, added to
        ``main_grad`` where they have one.
    """
    if not grad_TH.shape[0]:
        return grad_TH, torch.zeros_like(probs_T)
    if result is None:
        x_TH = inputs[0].detach() if len(inputs) == 1 else torch.cat(list(inputs))
    else:
        x_TH = grad_TH.new_zeros(1, 1).expand(grad_TH.shape)
    x_TH, probs_T = x_TH.requires_grad_(), probs_T.detach().requires_grad_()
    tape = Tape(parts, inputs, result)
    with torch.enable_grad(), _taped(experts, tape):
        made, _ = experts(x_TH, rows_E, probs_T)
    tape.result, tape.results, result = None, [], None
    torch.autograd.backward(made, grad_TH)
    assert x_TH.grad is not None and probs_T.grad is not None
    return x_TH.grad, probs_T.grad


class _Product(torch.autograd.Function):
    """A grouped product, computed or replayed, with weight gradients by part."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_TI: torch.Tensor,
        weight_EOI: torch.Tensor,
        rows_E: Rows,
        parts: int,
        inputs: Sequence[torch.Tensor] | None,
        result: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.rows = [tuple(part) for part in np.reshape(rows_E, (parts, -1)).tolist()]
        ctx.rows_E, ctx.weight = tuple(rows_E), weight_EOI
        if inputs is None:
            inputs = [x for x in x_TI.split([sum(rows) for rows in ctx.rows]) if x.shape[0]]
        offsets = group_offsets(x_TI, rows_E)
        ctx.save_for_backward(offsets, *inputs)
        return output(x_TI, weight_EOI, offsets, ctx.rows_E) if result is None else result

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> Any:  # type: ignore[override]
        weight_EOI, (offsets, *inputs) = ctx.weight, ctx.saved_tensors
        grad_TO = grad_TO.contiguous()
        grad_TI = input_gradient(grad_TO, weight_EOI, offsets, ctx.rows_E)
        grads = grad_TO.split([sum(rows) for rows in ctx.rows])
        whole, remaining = None, iter(inputs)
        for part, (rows, grad) in enumerate(zip(ctx.rows, grads, strict=True)):
            if not any(rows):
                continue
            own = slice(part * len(rows), (part + 1) * len(rows))
            gradient = weight_gradient(grad, next(remaining), group_offsets(grad, rows), rows)
            if hasattr(weight_EOI, "main_grad"):
                # As Megatron's DDP would, but only for the parts that have gone backward.
                weight_EOI.main_grad[own].add_(gradient)
                weight_EOI.grad_added_to_main_grad = True
            else:
                whole = torch.zeros_like(weight_EOI) if whole is None else whole
                whole[own] = gradient
            del gradient  # Before the next part's is made.
        return grad_TI, whole, None, None, None, None
