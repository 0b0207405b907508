"""Layout-invariant initialisation.

A weight's first value depends on (seed, global key, layer, expert) alone. Megatron's sharded
state dict names every local tensor's global key, shape and offset, fused gates included, so the
same numbers come out for any rank, layout or provider.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

# Weights that write into the residual stream start smaller (GPT-2's rule, as Megatron's
# scaled_init_method_normal): std / sqrt(2 * layers).
RESIDUAL_WRITERS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialise(chunks: Sequence[torch.nn.Module], config: TransformerConfig, seed: int) -> None:
    """Fill the parameters of this rank's model chunks in place."""
    for chunk in chunks:
        state: dict[str, Any] = chunk.sharded_state_dict()  # type: ignore[operator]
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor) and tensor.data.is_floating_point():
                _fill(tensor, config, seed)


def _fill(tensor: ShardedTensor, config: TransformerConfig, seed: int) -> None:
    data = tensor.data
    if "norm" in tensor.key:
        data.fill_(1.0)
        return
    if tensor.key.endswith((".bias", "expert_bias")) or data.dim() < 2:
        data.zero_()
        return
    std = config.init_method_std
    if tensor.key.endswith(RESIDUAL_WRITERS):
        std /= math.sqrt(2.0 * config.num_layers)
    # One generator per matrix: its global rows x columns, under one (layer, expert) index.
    rows, columns = tensor.global_shape[-2:]
    row, column = tensor.global_offset[-2:]
    outer_axes = len(tensor.global_shape) - 2
    local = data.view(*([1] * (len(tensor.global_shape) - data.dim())), *data.shape)
    for index in itertools.product(*(range(local.shape[axis]) for axis in range(outer_axes))):
        place = [tensor.global_offset[axis] + i for axis, i in enumerate(index)]
        matrix = _normal(seed, tensor.key, place, rows, columns, std)
        part = local[index]
        part.copy_(matrix[row : row + part.shape[0], column : column + part.shape[1]])


def _normal(
    seed: int, key: str, place: Sequence[int], rows: int, columns: int, std: float
) -> torch.Tensor:
    name = f"{seed}/{key}/{'/'.join(map(str, place))}"
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    generator = torch.Generator().manual_seed(digest % 2**63)
    return torch.randn(rows, columns, generator=generator) * std
