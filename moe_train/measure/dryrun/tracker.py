"""Memory tracker: live bytes of tensor storages by category, module and phase.

Every operation's results pass through a dispatch mode, on fake tensors as on real ones: a
storage counts from the operation that made it until its release. What operations use inside
(a kernel's workspace) is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
ACTIVATIONS, COMMUNICATION, TEMPORARIES = "activations", "communication", "temporaries"
CATEGORIES = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, COMMUNICATION, TEMPORARIES)


@dataclass(frozen=True)
class Piece:
    """A live storage."""

    bytes: int
    category: str
    module: str
    """Module whose forward or backward pass made it; empty outside of all."""
    phase: str


@dataclass(frozen=True)
class Peak:
    """The moment of most bytes."""

    bytes: int
    phase: str
    """Such as ``backward of micro-batch 3``."""
    module: str
    """Where the step stood."""
    categories: dict[str, int]
    modules: dict[str, int]
    """Bytes other than weights, gradients and optimizer state, by the module that made them."""


class MemoryTracker(TorchDispatchMode):
    """Follow storages while active.

    Args:
        block: bytes that an allocation is rounded up to (1: tensors as they are).
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self._block = block
        self._pieces: dict[int, Piece] = {}
        self._stack = ExitStack()
        self.live = 0
        self.phase, self.module = "", ""
        self.category = TEMPORARIES
        """Category of new storages until something else is known of them."""
        self._most = 0
        self._snapshot: dict[int, Piece] = {}
        self._moment = ("", "")

    def __enter__(self) -> MemoryTracker:
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = resize(storage, size)
            self._resized(storage)
            return result

        self._stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resized))
        self._stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor)
        )
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            for tensor in tree_iter((args, result)):
                self._note(tensor, COMMUNICATION)
        elif isinstance(result, torch.Tensor):
            self._note(result, self.category)
        else:
            for tensor in tree_iter(result):
                self._note(tensor, self.category)
        return result

    def own(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Assign a category to ``tensors``."""
        for tensor in tensors:
            self._note(tensor, category)
            key = tensor.untyped_storage()._cdata
            self._relabel(key, self._pieces[key], category)

    def total(self, category: str) -> int:
        """Live bytes of a category."""
        return sum(piece.bytes for piece in self._pieces.values() if piece.category == category)

    def begin(self) -> None:
        """Forget the peak so far."""
        self._most = 0
        self._grown()

    def peak(self) -> Peak:
        """The moment of most live bytes since :meth:`begin`."""
        categories, modules = Counter[str](), Counter[str]()
        phase, module = self._moment
        for piece in self._snapshot.values():
            categories[piece.category] += piece.bytes
            if piece.category not in (WEIGHTS, GRADIENTS, OPTIMIZER):
                modules[piece.module] += piece.bytes
        named = {name: categories[name] for name in CATEGORIES}
        return Peak(self._most, phase, module, named, dict(modules.most_common()))

    def _note(self, tensor: Any, category: str) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        piece = self._pieces.get(storage._cdata)
        if piece is not None:
            if category == COMMUNICATION and piece.category == TEMPORARIES:
                self._relabel(storage._cdata, piece, category)
            return
        key = storage._cdata
        self._pieces[key] = Piece(self._size(storage), category, self.module, self.phase)
        weakref.finalize(storage, partial(self._released, key)).atexit = False
        self.live += self._pieces[key].bytes
        self._grown()

    def _saved(self, tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        piece = self._pieces.get(key)
        if piece is not None and piece.category in (TEMPORARIES, COMMUNICATION):
            self._relabel(key, piece, ACTIVATIONS)
        return tensor

    def _relabel(self, key: int, piece: Piece, category: str) -> None:
        # Pieces in the snapshot stay as they were then: a new one takes the place.
        self._pieces[key] = Piece(piece.bytes, category, piece.module, piece.phase)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        piece = self._pieces.get(storage._cdata)
        if piece is None:
            return
        size = self._size(storage)
        self.live += size - piece.bytes
        self._pieces[storage._cdata] = Piece(size, piece.category, piece.module, piece.phase)
        self._grown()

    def _released(self, key: int) -> None:
        self.live -= self._pieces.pop(key).bytes

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._block) * self._block

    def _grown(self) -> None:
        if self.live > self._most:
            self._most = self.live
            self._moment = (self.phase, self.module)
            self._snapshot = dict(self._pieces)
