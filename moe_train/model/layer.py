"""The transformer layer: Megatron's, with a per-layer choice of full recompute."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer


class Layer(TransformerLayer):
    """A TransformerLayer that recomputes itself when its 1-based number is listed.

    Megatron's own full recompute picks layers by method and count per stage; a list of global
    layer numbers means the same thing in every layout.
    """

    def __init__(self, *args: Any, recomputed: frozenset[int] = frozenset(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recompute = self.layer_number in recomputed

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Hidden states [sequence / TP, batch, hidden] in and out, and Megatron's context."""
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")

        def run(hidden: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return super(Layer, self).forward(hidden, *args, **kwargs)

        return tensor_parallel.checkpoint(run, False, hidden)
