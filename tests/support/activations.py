"""Bytes that the autograd graph keeps between forward and backward, counted as they live."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np
import torch


class _Packed:
    """What the graph holds in place of a saved tensor; its death is the tensor's release."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Live and peak bytes of distinct storages saved for backward.

    Args:
        excluded: tensors that live anyway (weights, gradients, inputs).
    """

    def __init__(self, excluded: Sequence[torch.Tensor]) -> None:
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self._holders: dict[int, int] = {}
        self.live, self.peak = 0, 0

    def watch(self) -> AbstractContextManager[None]:
        """Count tensors saved inside this context, recomputed ones included."""
        context: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(
            self._pack, lambda packed: packed.tensor
        )
        return context

    def exclude(self, tensor: torch.Tensor) -> None:
        """Count a tensor that is kept for backward outside of the graph, as long as it lives."""
        self._count(tensor, tensor)

    def _pack(self, tensor: torch.Tensor) -> _Packed:
        packed = _Packed(tensor)
        self._count(tensor, packed)
        return packed

    def _count(self, tensor: torch.Tensor, holder: Any) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._excluded or size == 0:
            return
        if not self._holders.get(address):
            self.live += size
            self.peak = max(self.peak, self.live)
        self._holders[address] = self._holders.get(address, 0) + 1
        weakref.finalize(holder, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            self.live -= size


def peak_saved_bytes(rank: int, world: int, overrides: Sequence[str]) -> tuple[int, int, str]:
    """(peak, left after the step, exact loss) of one training step on made-up tokens."""
    from moe_train.model.span import experts
    from moe_train.train.step import train_step
    from tests.support.engines import micro_batches, open_engine

    engine = open_engine(rank, world, overrides)
    shape = (engine.run.microbatches * engine.config.batch.micro, engine.config.data.sequence + 1)
    batches = micro_batches(engine, np.random.default_rng(0).integers(0, 100, shape))
    anyway: list[Any] = [p for chunk in engine.chunks for p in chunk.parameters()]
    anyway += [p.main_grad for p in anyway if hasattr(p, "main_grad")]
    anyway += [value for batch in batches for value in batch.values()]
    saved = SavedBytes(anyway)

    def hosted(*parts: Any) -> Any:
        for part in parts:
            if torch.is_tensor(part):
                saved.exclude(part)
        return plain(*parts)

    plain = experts.Saved
    with saved.watch(), mock.patch.object(experts, "Saved", hosted):
        result = train_step(engine, batches, 1)
    return saved.peak, saved.live, result.loss.hex()
