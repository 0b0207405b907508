"""States that data-parallel ranks hold in slices: a whole parameter is brought together on the
host of the rank that writes it, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from moe_train.checkpoint import staging
from moe_train.checkpoint.entries import Entry, Tree, listed
from moe_train.checkpoint.staging import Staging

type Span = tuple[int, int]
"""A range of a flat parameter."""


@dataclass(eq=False)
class Slice(Entry):
    """A tensor of which this rank holds a range of the flat elements, or none."""

    live: torch.Tensor
    """The whole parameter of the model: for its shape."""
    group: dist.ProcessGroup
    """The ranks that hold the other ranges."""
    span: Span | None
    get: Callable[[], torch.Tensor]
    """This rank's range, as it lies or unpacked."""
    put: Callable[[torch.Tensor, Staging], None]
    """Set this rank's range from values on the host."""
    spans: list[Span | None] = field(default_factory=list)
    """Of every rank of the group, once :func:`exchange_spans` has run."""

    def target(self) -> torch.Tensor:
        """Host memory for the whole, of which :meth:`store` takes the range."""
        return staging.host_empty(self.shape, self.dtype)

    def store(self, values: torch.Tensor, through: Staging) -> None:
        """Take this rank's range."""
        if self.span is not None:
            begin, end = self.span
            self.put(values.view(-1)[begin:end], through)


def slices_of(tree: Tree) -> list[Slice]:
    """Slices among the entries of ``tree``."""
    return [entry for entry in listed(tree) if isinstance(entry, Slice)]


def exchange_spans(slices: Sequence[Slice]) -> None:
    """Tell every rank which ranges its peers hold; collective over each group."""
    groups: dict[int, list[Slice]] = {}
    for entry in slices:
        groups.setdefault(id(entry.group), []).append(entry)
    for members in groups.values():
        group = members[0].group
        told: list[Any] = [None] * group.size()
        dist.all_gather_object(told, [entry.span for entry in members], group=group)
        for number, entry in enumerate(members):
            entry.spans = [spans[number] for spans in told]


class Stream:
    """Whole parameters, one after the other, on the ranks that ask for them.

    Every rank of a group walks through the same entries in the same order: the owner of a range
    broadcasts it, a piece at a time, and who wants the parameter keeps it. Broadcasting uses the
    communicator that the optimizer has already, where sending would open others. All ranks have to
    reach the end, in :meth:`drain` if not by asking, or their peers would wait.

    Args:
        slices: in the order of the file, whoever writes it.

    Raises:
        torch.OutOfMemoryError: the device has no room for a piece.
    """

    def __init__(self, slices: Sequence[Slice], through: Staging) -> None:
        self._slices, self._staging = slices, through
        self._steps = list(self._cut())
        self._done = 0
        self._kept: tuple[Slice, torch.Tensor] | None = None
        self._buffers: dict[torch.device, torch.Tensor] = {}
        largest = max((end - begin for _, _, begin, end in self._steps), default=0)
        for entry in slices:
            device = entry.live.device
            if device not in self._buffers:
                self._buffers[device] = torch.empty(largest, dtype=torch.float32, device=device)

    def whole(self, entry: Slice) -> torch.Tensor:
        """The parameter on the host, in fp32; parameters before it are let go by."""
        if self._kept is not None and self._kept[0] is entry:
            return self._kept[1]
        self._kept = None
        # Before its first piece: without room for it, the rest can still be let go by.
        values = staging.host_empty(entry.shape, entry.dtype)
        flat = values.view(-1)
        while self._pending() is not entry:
            self._advance()
        while self._pending() is entry:
            begin, end, piece = self._advance()
            self._staging.piece_to_host(piece, flat[begin:end])
        self._kept = entry, values
        return values

    def drain(self) -> None:
        """Let all that is left go by."""
        self._kept = None
        while self._pending() is not None:
            self._advance()

    def _cut(self) -> Iterator[tuple[Slice, int, int, int]]:
        limit = staging.PIECE // 4
        for entry in self._slices:
            for owner, span in enumerate(entry.spans):
                if span is not None:
                    for begin in range(*span, limit):
                        yield entry, owner, begin, min(begin + limit, span[1])

    def _pending(self) -> Slice | None:
        return self._steps[self._done][0] if self._done < len(self._steps) else None

    def _advance(self) -> tuple[int, int, torch.Tensor]:
        entry, owner, begin, end = self._steps[self._done]
        # This piece counts as gone by whatever becomes of it here.
        self._done += 1
        piece = self._buffers[entry.live.device][: end - begin]
        if owner == entry.group.rank():
            assert entry.span is not None
            first = entry.span[0]
            piece.copy_(entry.get().view(-1)[begin - first : end - first])
        if entry.group.size() > 1:
            dist.broadcast(piece, dist.get_global_rank(entry.group, owner), group=entry.group)
        return begin, end, piece
