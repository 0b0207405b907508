"""Megatron's MoE layer with the cross-stage dispatcher in place of its token dispatcher."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_capacity, permute, unpermute
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_train.model.span.dispatcher import CrossStageDispatcher, DispatchAndCombine
from moe_train.model.span.experts import SpanExperts


class SpanMoELayer(MoELayer):
    """Megatron's router, permutation, shared experts and auxiliary losses around the dispatcher."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        layer_number: int | None = None,
        pg_collection: Any = None,
        *,
        dispatcher: CrossStageDispatcher,
        **kwargs: Any,
    ) -> None:
        groups = copy.copy(pg_collection)
        groups.ep = dispatcher.group
        submodules = copy.copy(submodules)
        submodules.experts = partial(
            SpanExperts,
            builder=submodules.experts,
            stages=dispatcher.stages,
            recompute=dispatcher.recompute,
        )
        super().__init__(config, submodules, layer_number, groups, **kwargs)
        self.dispatcher = dispatcher
        self.local_layer = -1

    def set_layer_number(self, layer_number: int) -> None:
        """Set the 1-based global layer number; Megatron calls this after construction."""
        super().set_layer_number(layer_number)
        self.local_layer = (layer_number - 1) % (self.config.num_layers // self.dispatcher.stages)
        self.dispatcher.register(self.local_layer, self.experts.local)

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Any = None,
    ) -> tuple[torch.Tensor, None]:
        """Hidden states [sequence / TP, batch, hidden] in and out."""
        assert intermediate_tensors is None and padding_mask is None
        probs, routing_map = self.route(hidden_states)
        shape = hidden_states.shape
        tokens = hidden_states.view(-1, shape[-1])
        padded = bool(self.config.moe_pad_expert_input_to_capacity)
        # Counts first: they give the number of rows to permute, without those that are dropped.
        counts = self.dispatcher.counts(self.local_layer, self._counts(routing_map, padded))
        routed, routed_probs, order, _, _ = permute(
            tokens,
            routing_map,
            probs=probs,
            num_out_tokens=sum(counts.sent),
            fused=self.config.moe_permute_fusion,
            drop_and_pad=padded,
        )
        grad, shared = torch.is_grad_enabled(), []

        def shared_experts() -> None:
            # Called from inside an autograd function, which switches gradients off.
            with torch.set_grad_enabled(grad):
                shared.append(self.shared_experts_compute(hidden_states))

        overlapped = shared_experts if self.use_shared_expert else None
        result = DispatchAndCombine.apply(
            self.dispatcher, self.local_layer, counts, routed, routed_probs, overlapped
        )
        output = unpermute(
            result,
            order,
            restore_shape=tokens.shape,
            routing_map=routing_map,
            fused=self.config.moe_permute_fusion,
            drop_and_pad=padded,
        ).view(shape)
        return (output + shared[0] if shared else output), None

    def _counts(self, routing_map: torch.Tensor, padded: bool) -> torch.Tensor:
        """Tokens that go to each expert, [experts]."""
        if not padded:
            return routing_map.sum(dim=0)
        factor = self.config.moe_expert_capacity_factor
        experts = routing_map.shape[1]
        assert factor is not None
        capacity = get_capacity(
            num_tokens=routing_map.shape[0] * self.config.moe_router_topk,
            num_experts=experts,
            capacity_factor=factor,
        )
        return torch.full((experts,), int(capacity), dtype=torch.int64, device=routing_map.device)
