"""An engine on every rank of a test world, its tensors by global key, and made-up batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from moe_train.train.engine import Engine

Array = NDArray[Any]


@dataclass(frozen=True)
class Shard:
    """A rank's part of a global tensor; arrays, so that it may travel between processes."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Array

    @property
    def where(self) -> tuple[slice, ...]:
        """The part's place in the global tensor."""
        data = self.data.shape
        return tuple(slice(o, o + n) for o, n in zip(self.offset, data, strict=True))


def open_engine(rank: int, world: int, overrides: Sequence[str], vocab: int = 128) -> Engine:
    """Build the engine of a run with ``overrides``, without data; call on every rank."""
    from moe_train.backend.groups import open_groups, open_world
    from moe_train.backend.select import select_backend
    from moe_train.run.resolution import resolve_on_all_ranks
    from moe_train.train.engine import build_engine

    run = resolve_on_all_ranks(["device=cpu", *overrides], world)
    config = run.config
    backend = select_backend(config.device, config.backend)
    backend.prepare()
    open_world(backend, rank, world, 120)
    groups = open_groups(run.layout, timeout_seconds=120)
    return build_engine(run.with_vocabulary(vocab, "test"), backend, groups)


def _sharded(engine: Engine) -> Iterator[Any]:
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    for chunk in engine.chunks:
        state = chunk.module.sharded_state_dict()
        apply_factories(state)
        yield from (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def shards(engine: Engine) -> list[Shard]:
    """This rank's weights, replicas included."""
    return [
        Shard(
            tensor.key,
            tuple(tensor.global_shape),
            tuple(tensor.global_offset),
            tensor.data.detach()
            .float()
            .reshape(*[1] * tensor.prepend_axis_num, *tensor.data.shape)
            .numpy()
            .copy(),
        )
        for tensor in _sharded(engine)
        if tensor.data.is_floating_point()
    ]


def gradient_shards(engine: Engine) -> list[Shard]:
    """This rank's gradients after a step (``optim.clip=0``), under their weights' keys."""
    parameters = [p for chunk in engine.chunks for p in chunk.parameters() if p.requires_grad]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.to(parameter.dtype)  # type: ignore[attr-defined]
    try:
        return [shard for shard in shards(engine) if not shard.key.endswith("expert_bias")]
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight


@torch.no_grad()
def fill(engine: Engine, weights: Mapping[str, Array]) -> None:
    """Set every weight of this rank from global arrays by key (fp32 runs: no master copies)."""
    for tensor in _sharded(engine):
        place = tuple(
            slice(o, o + n)
            for o, n in zip(
                tensor.global_offset,
                [1] * tensor.prepend_axis_num + list(tensor.data.shape),
                strict=True,
            )
        )
        whole = weights[tensor.key]
        assert whole.shape == tuple(tensor.global_shape), tensor.key
        tensor.data.copy_(torch.from_numpy(whole[place].copy()).view(tensor.data.shape))


def assemble(ranks: Sequence[Sequence[Shard]]) -> dict[str, Array]:
    """Global arrays from all ranks' shards.

    Raises:
        AssertionError: a replica differs from another, or a part is missing.
    """
    whole: dict[str, Array] = {}
    seen: dict[str, NDArray[np.bool_]] = {}
    for shard in (shard for rank in ranks for shard in rank):
        array = whole.setdefault(shard.key, np.zeros(shard.shape, shard.data.dtype))
        covered = seen.setdefault(shard.key, np.zeros(shard.shape, bool))
        assert array.shape == shard.shape, shard.key
        if covered[shard.where].any():
            assert covered[shard.where].all(), f"{shard.key}: shards overlap in part"
            assert np.array_equal(array[shard.where], shard.data), f"{shard.key}: replicas differ"
        array[shard.where] = shard.data
        covered[shard.where] = True
    missing = [key for key, covered in seen.items() if not covered.all()]
    assert not missing, f"parts missing: {missing}"
    return whole


def micro_batches(engine: Engine, tokens_NS: Array) -> list[dict[str, torch.Tensor]]:
    """This replica's micro-batches of a global batch of token ids, [sequences, S + 1].

    The order is that of :class:`moe_train.data.batches.BatchSource`.
    """
    from moe_train.data.batches import BatchSource

    sequence = tokens_NS.shape[1] - 1
    dataset = [
        {
            "tokens": torch.from_numpy(row[:-1].copy()),
            "labels": torch.from_numpy(row[1:].copy()),
            "loss_mask": torch.ones(sequence),
            "position_ids": torch.arange(sequence),
        }
        for row in tokens_NS
    ]
    dp = engine.groups.dp
    source = BatchSource(dataset, len(tokens_NS), engine.config.batch.micro, dp.rank(), dp.size())
    return list(source.next_step())
