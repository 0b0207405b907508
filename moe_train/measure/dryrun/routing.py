"""Known token counts per expert, which fake tensors cannot provide.

All shapes of a step follow from the configuration but one: how many rows each expert gets. Here
every rank sends its rows evenly, and a rank's experts receive ``imbalance`` times the average,
spread evenly over sources and experts. Counts are host numbers (lists and arrays), as they are
in a real step after their way off the device.

Shape letters: N tokens, K experts a token, R ranks that send, E experts of a layer on a rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from numpy.typing import NDArray

from moe_train.model.span.dispatcher import FORWARD, CrossStageDispatcher
from moe_train.model.span.layer import SpanMoELayer

Counts = NDArray[np.int64]


def even(total: int, parts: int) -> Counts:
    """``total`` as ``parts`` integers that differ by one at most."""
    return np.diff(np.arange(parts + 1, dtype=np.int64) * total // parts)


def _spread(totals: list[int], experts: int) -> Counts:
    return np.stack([even(total, experts) for total in totals])


@contextlib.contextmanager
def known_routing(rows: int, imbalance: float) -> Iterator[None]:
    """Give Megatron's all-to-all dispatcher and the spanning exchange their counts.

    Args:
        rows: N K, what every rank sends of a micro-batch and layer.
        imbalance: rows of this rank's experts over the average.
    """
    with (
        mock.patch.object(MoEAlltoAllTokenDispatcher, "preprocess", _preprocess(imbalance)),
        mock.patch.object(SpanMoELayer, "_counts", _own_counts),
        mock.patch.object(
            CrossStageDispatcher, "exchange_counts", _exchange_counts(rows, imbalance)
        ),
    ):
        yield


def _preprocess(imbalance: float) -> Callable[[Any, Any], Counts]:
    def preprocess(self: Any, routing_map: Any) -> Counts:
        config = self.config
        rows, factor = routing_map.size(0) * config.moe_router_topk, imbalance
        if self.drop_and_pad:
            self.capacity = get_capacity(rows, self.num_experts, config.moe_expert_capacity_factor)
            rows, factor = self.capacity * self.num_experts, 1.0
        self.num_out_tokens = rows
        if self.ep_size == 1:
            # All experts of a layer are here: who is busier than whom changes no total.
            factor = 1.0
        received = even(round(rows * factor), self.ep_size)
        self.input_splits = even(rows, self.ep_size).tolist()
        self.output_splits = received.tolist()
        self.output_splits_tp = np.full(self.tp_size, received.sum())
        if self.ep_size == self.tp_size == 1:
            self.input_splits = self.output_splits = self.output_splits_tp = None
        counts = _spread(received.tolist() * self.tp_size, self.num_local_experts)
        self.num_global_tokens_per_local_expert = counts
        chunks = np.arange(counts.size)
        self.sort_input_by_local_experts = chunks.reshape(counts.shape).T.ravel()
        self.restore_output_by_local_experts = chunks.reshape(counts.T.shape).T.ravel()
        return counts.sum(axis=0)

    return preprocess


def _own_counts(self: Any, routing_map: Any, padded: bool) -> Counts:
    rows, experts = routing_map.size(0) * self.config.moe_router_topk, routing_map.size(1)
    if padded:
        return np.full(experts, get_capacity(rows, experts, self.config.moe_expert_capacity_factor))
    return even(rows, experts)


def _exchange_counts(rows: int, imbalance: float) -> Callable[..., tuple[list[int], Counts]]:
    def exchange_counts(self: Any, layer: int, counts: Counts | None) -> tuple[list[int], Counts]:
        ranks, experts = self.group.size(), self._experts[layer].per_rank
        sent = [0] * ranks
        if counts is not None:
            sent = counts.reshape(ranks, experts).sum(axis=1).tolist()
        active = [source // self.tensor in self._slots[FORWARD].active for source in range(ranks)]
        received = [round(rows * imbalance / ranks) if busy else 0 for busy in active]
        return sent, _spread(received, experts)

    return exchange_counts
