"""Which cells of which global tensors a sharded state dict covers, whatever its storage.

One provider stacks the experts of a layer in one tensor, another keeps one tensor per expert;
gates and ups may be fused. A checkpoint moves between two models if their matrices, cell by
cell of the global tensors, are the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories


class Matrix(NamedTuple):
    """A rank's part of one matrix (or vector) of a global tensor."""

    key: str
    """Global name in a checkpoint."""
    shape: tuple[int, ...]
    """Shape of the whole global tensor."""
    place: tuple[int, ...]
    """Global index along the outer axes, such as (layer, expert)."""
    corner: tuple[int, ...]
    """Global index of the first cell within the matrix."""
    size: tuple[int, ...]
    """Local rows and columns."""
    dtype: str

    @property
    def cells(self) -> int:
        """Number of cells."""
        return math.prod(self.size)


def matrices(chunks: Iterable[torch.nn.Module]) -> set[Matrix]:
    """The floating-point matrices that a rank's model chunks would save.

    Outer axes are those before the last two of a global tensor, or before the last one where
    the axes of a vector are (layer, width): Megatron prepends them without giving them a
    place in the local tensor.
    """
    result: set[Matrix] = set()
    for chunk in chunks:
        state: dict[str, Any] = chunk.sharded_state_dict()  # type: ignore[operator]
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor):
                result.update(_split(tensor))
    return result


def _split(tensor: ShardedTensor) -> Iterable[Matrix]:
    axes = len(tensor.global_shape)
    assert tensor.prepend_axis_num + len(tensor.local_shape) == axes
    local = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    inner = axes - tensor.prepend_axis_num
    # Stacked experts are one more outer axis, which a tensor per expert has prepended.
    outer = axes - min(inner, 2)
    for index in itertools.product(*(range(size) for size in local[:outer])):
        yield Matrix(
            tensor.key,
            tuple(tensor.global_shape),
            tuple(o + i for o, i in zip(tensor.global_offset[:outer], index, strict=True)),
            tuple(tensor.global_offset[outer:]),
            local[outer:],
            str(tensor.dtype),
        )


def whole_model(ranks: Iterable[set[Matrix]]) -> int:
    """Parameters of the model that ``ranks`` hold together, replicas counted once.

    Raises:
        AssertionError: the parts leave a gap in a global tensor, overlap, or disagree about it.
    """
    parts = set().union(*ranks)
    held: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        assert shapes.setdefault(part.key, part.shape) == part.shape, part
        ends = (c + s for c, s in zip(part.corner, part.size, strict=True))
        assert all(end <= n for end, n in zip(ends, part.shape[-len(part.size) :], strict=True))
        held[part.key] = held.get(part.key, 0) + part.cells
    for key, cells in held.items():
        assert cells == math.prod(shapes[key]), f"{key}: {cells} cells of {shapes[key]}"
    return sum(held.values())
