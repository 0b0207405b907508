"""Local shards of a checkpoint's global tensors, described without copies, and gathered piecewise.

Nothing is copied to describe a state: Megatron plans on ``meta`` tensors without memory, and a
shard's values are fetched when its bytes are written, or set as they are read. Where the
distributed optimizer splits a parameter over data-parallel ranks, :class:`ParameterGather` brings
it together on the host of the rank that writes it, piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from moe_train.checkpoint import staging
from moe_train.checkpoint.staging import Staging

type Sharded = ShardedTensor | ShardedTensorFactory
type StateDict = dict[str, Any]
""":class:`LocalShard` objects in nested dictionaries; their order is that of the files."""
type Range = tuple[int, int]
"""Begin and end in a flattened parameter."""


@dataclass(eq=False)
class LocalShard:
    """A tensor that this rank holds whole; a factory splits it into several global tensors."""

    sharded: Sharded
    """Key, shape and global offset; its data does not count."""
    dtype: torch.dtype
    """Of the checkpoint."""
    tensor: torch.Tensor
    """The live parameter, buffer or state, in any dtype, or a view of it."""

    @property
    def shape(self) -> torch.Size:
        """Of the local part."""
        return self.tensor.shape

    def with_data(self, data: torch.Tensor) -> Sharded:
        """The sharded tensor, or the factory of several, with ``data``."""
        if isinstance(self.sharded, ShardedTensorFactory):
            return replace(self.sharded, data=data)
        return replace(self.sharded, data=data, dtype=data.dtype)

    def sharded_tensors(self, data: torch.Tensor) -> list[ShardedTensor]:
        """The sharded tensors that a checkpoint has of this shard: views of ``data``."""
        sharded = self.with_data(data)
        if isinstance(sharded, ShardedTensorFactory):
            return list(nested_values({"": sharded.build()}))
        return [sharded]

    def meta(self) -> torch.Tensor:
        """A tensor of this shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def load_buffer(self) -> torch.Tensor:
        """Where values that are read go; :meth:`store` then sets the state from it."""
        return self.tensor

    def store(self, values: torch.Tensor, through: Staging) -> None:
        """Set the state from a filled :meth:`load_buffer`; nothing to do if that is the state."""


@dataclass(eq=False)
class FlatShard(LocalShard):
    """A state of which this rank holds a range of the flattened elements, or none."""

    tensor: torch.Tensor
    """The whole parameter of the model: for its shape."""
    group: dist.ProcessGroup
    """The ranks that hold the other ranges."""
    range: Range | None
    get: Callable[[], torch.Tensor]
    """This rank's range, as it is stored or unscaled."""
    put: Callable[[torch.Tensor, Staging], None]
    """Set this rank's range from values on the host."""
    ranges: list[Range | None] = field(default_factory=list)
    """Of every rank of the group, once :func:`gather_ranges` has run."""

    def load_buffer(self) -> torch.Tensor:
        """Host memory for the whole, of which :meth:`store` takes the range."""
        return staging.host_empty(self.shape, self.dtype)

    def store(self, values: torch.Tensor, through: Staging) -> None:
        """Set this rank's range."""
        if self.range is not None:
            begin, end = self.range
            self.put(values.view(-1)[begin:end], through)


def shards_of(state: StateDict) -> Iterator[LocalShard]:
    """All shards, in order."""
    yield from nested_values(state)


def flat_shards(state: StateDict) -> list[FlatShard]:
    """Those of them that other ranks hold ranges of."""
    return [shard for shard in shards_of(state) if isinstance(shard, FlatShard)]


def meta_state_dict(state: StateDict) -> dict[str, Any]:
    """``state`` as a sharded state dict on ``meta`` tensors, for Megatron to plan on."""
    planned: dict[str, Any] = dict_list_map_outplace(lambda s: s.with_data(s.meta()), state)
    return planned


def gather_ranges(shards: Sequence[FlatShard]) -> None:
    """Fill in which ranges the peers hold; collective over each group."""
    groups: dict[int, list[FlatShard]] = {}
    for shard in shards:
        groups.setdefault(id(shard.group), []).append(shard)
    for members in groups.values():
        group = members[0].group
        gathered: list[Any] = [None] * group.size()
        dist.all_gather_object(gathered, [shard.range for shard in members], group=group)
        for number, shard in enumerate(members):
            shard.ranges = [ranges[number] for ranges in gathered]


class ParameterGather:
    """Whole parameters, one after the other, on the ranks that ask for them.

    Every rank of a group walks through the same shards in the same order: the owner of a range
    broadcasts it, a piece at a time, and who wants the parameter keeps it. Broadcasting uses the
    communicator that the optimizer has already, where sending would open others. All ranks have to
    reach the end, in :meth:`finish` if not by asking, or their peers would wait.

    Args:
        shards: in the order of the file, whichever rank writes it; their ranges are gathered.

    Raises:
        torch.OutOfMemoryError: the device lacks memory for a piece.
    """

    def __init__(self, shards: Sequence[FlatShard], through: Staging) -> None:
        self._staging = through
        limit = staging.PIECE // 4
        self._pieces = [
            (shard, owner, begin, min(begin + limit, owned[1]))
            for shard in shards
            for owner, owned in enumerate(shard.ranges)
            if owned is not None
            for begin in range(*owned, limit)
        ]
        self._done = 0
        self._last: tuple[FlatShard, torch.Tensor] | None = None
        largest = max((end - begin for _, _, begin, end in self._pieces), default=0)
        self._buffers = {
            device: torch.empty(largest, dtype=torch.float32, device=device)
            for device in dict.fromkeys(shard.tensor.device for shard in shards)
        }

    def gather(self, shard: FlatShard) -> torch.Tensor:
        """The whole parameter on the host, in fp32; parameters before it are skipped."""
        if self._last is not None and self._last[0] is shard:
            return self._last[1]
        self._last = None
        # Before its first piece: without memory for it, the rest can still be skipped.
        values = staging.host_empty(shard.shape, shard.dtype)
        flat = values.view(-1)
        while self._next() is not shard:
            self._broadcast()
        while self._next() is shard:
            begin, end, piece = self._broadcast()
            self._staging.piece_to_host(piece, flat[begin:end])
        self._last = shard, values
        return values

    def finish(self) -> None:
        """Take part in the broadcasts that are left."""
        self._last = None
        while self._next() is not None:
            self._broadcast()

    def _next(self) -> FlatShard | None:
        return self._pieces[self._done][0] if self._done < len(self._pieces) else None

    def _broadcast(self) -> tuple[int, int, torch.Tensor]:
        shard, owner, begin, end = self._pieces[self._done]
        # This piece counts as done whatever becomes of it here.
        self._done += 1
        piece = self._buffers[shard.tensor.device][: end - begin]
        if owner == shard.group.rank():
            assert shard.range is not None
            first = shard.range[0]
            piece.copy_(shard.get().view(-1)[begin - first : end - first])
        if shard.group.size() > 1:
            dist.broadcast(piece, dist.get_global_rank(shard.group, owner), group=shard.group)
        return begin, end, piece
