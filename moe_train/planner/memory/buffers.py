"""The distributed optimizer's flat buffers to the element: padding, buckets, who owns what.

Megatron-Core 0.19 lays a chunk's parameters out backwards, each from a multiple of 64 elements
on, closes a bucket once it is full, and pads its end so that it divides over the replicas
(``DistributedOptimizer._compute_per_buffer_param_layout``). Every replica owns the same share of
each bucket, wherever that cuts the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from moe_train.config.model import ModelConfig
from moe_train.config.root import Config
from moe_train.parallel.layout import Layout
from moe_train.parallel.optimizer_state import StateBytes, bytes_per_parameter, state_bytes
from moe_train.parallel.parameters import padded_vocab, rank_parameters

ALIGNMENT = 64
BUCKET_END = 128


@dataclass(frozen=True)
class Parameter:
    """Elements of one tensor on a rank."""

    elements: int
    expert: bool = False
    """Reduced over the expert-data-parallel group, in a buffer of its own."""
    shared: bool = False
    """A tied embedding of the end stages, in a bucket of its own."""


def rank_state_bytes(config: Config, layout: Layout, rank: int, vocab: int) -> StateBytes:
    """Weights, gradients and optimizer state of a rank, padding and uneven cuts included.

    Without the distributed optimizer nothing is padded. Experts count as one tensor per matrix
    of a layer, as the host stacks them.
    """
    held = state_bytes(config, layout, rank_parameters(config.model, layout, rank, vocab))
    if not config.optim.distributed:
        return held
    each = bytes_per_parameter(config.dtype, config.optim)
    place = layout.coordinates(rank)
    dense = (place.dense.dp * layout.context + place.dense.cp, layout.data * layout.context)
    expert = (place.dense.dp if layout.span else place.expert.edp, layout.expert_data)
    padded = owned = 0
    for chunk in range(layout.virtual_pipeline):
        tensors = list(_chunk(config.model, layout, place.dense.pp, chunk, vocab))
        size = _bucket_size(config, layout, place.dense.pp, chunk)
        for kind, (index, replicas) in ((False, dense), (True, expert)):
            buffer = [tensor for tensor in tensors if tensor.expert is kind]
            length, mine = _lay_out(buffer, size, index, replicas)
            padded, owned = padded + length, owned + mine
    state = owned * each.state
    return StateBytes(
        weights=padded * each.weight,
        gradients=padded * each.gradient,
        optimizer=0 if config.optim.offload else state,
        host=state if config.optim.offload else 0,
    )


def _bucket_size(config: Config, layout: Layout, stage: int, chunk: int) -> int | None:
    """Elements that close a bucket; None for one bucket (``DistributedDataParallel``)."""
    if not config.parallel.overlap_grad_reduce or layout.span or stage or chunk:
        return None
    given = config.megatron.ddp.get("bucket_size")
    return int(given) if given else max(40_000_000, 1_000_000 * layout.data * layout.context)


def _chunk(
    model: ModelConfig, layout: Layout, stage: int, chunk: int, vocab: int
) -> Iterator[Parameter]:
    """Parameters of a model chunk in the order in which Megatron's modules own them."""
    hidden, tensor = model.hidden, layout.tensor
    query, groups = model.query_width, model.kv_width
    separate = layout.expert_in_stage > 1 or tensor != layout.expert_tensor
    matrix = model.experts // layout.expert * hidden * model.expert_hidden // layout.expert_tensor
    first = stage == 0 and chunk == 0
    last = stage == layout.pipeline - 1 and chunk == layout.virtual_pipeline - 1
    rows = padded_vocab(vocab, model.vocab_multiple) // tensor * hidden
    tied = model.tied_embeddings and layout.pipeline > 1
    if first:
        yield Parameter(rows, shared=tied)
    for _ in layout.stage_layers(stage, chunk):
        yield Parameter(hidden)
        yield Parameter(query * hidden // tensor)
        yield Parameter((query + 2 * groups) * hidden // tensor)
        yield Parameter(hidden)
        yield Parameter(model.experts * hidden)
        for _ in range(layout.pipeline if layout.span else 1):
            yield Parameter(2 * matrix, expert=separate)
            yield Parameter(matrix, expert=separate)
        if model.shared_expert_hidden:
            yield Parameter(2 * model.shared_expert_hidden * hidden // tensor)
            yield Parameter(model.shared_expert_hidden * hidden // tensor)
    if last:
        yield Parameter(hidden)
        if not (model.tied_embeddings and first):
            yield Parameter(rows, shared=tied)


def _lay_out(
    tensors: Sequence[Parameter], bucket: int | None, index: int, replicas: int
) -> tuple[int, int]:
    """Elements of a buffer with its padding, and those of parameters that replica `index` owns."""
    places: list[tuple[int, int, int]] = []
    ends: list[tuple[int, int]] = []
    begin = at = 0

    def close() -> int:
        divisor = math.lcm(replicas, BUCKET_END)
        ends.append((begin, -(-at // divisor) * divisor))
        return ends[-1][1]

    for tensor in reversed(tensors):
        at = -(-at // ALIGNMENT) * ALIGNMENT
        if tensor.shared and at > begin:
            begin = at = close()
        places.append((len(ends), at, at + tensor.elements))
        at += tensor.elements
        if tensor.shared or (bucket is not None and at - begin >= bucket):
            begin = at = close()
    if at > begin:
        close()
    owned = 0
    for number, inside in groupby(places, key=lambda place: place[0]):
        start, end = ends[number]
        share = (end - start) // replicas
        low = start + index * share
        owned += sum(max(0, min(b, low + share) - max(a, low)) for _, a, b in inside)
    return (ends[-1][1] if ends else 0), owned
