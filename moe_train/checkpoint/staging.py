"""Staging of tensors between a device and host memory, through one buffer of a fixed size.

Whole tensors would be copied, cast and made contiguous on the device, which lacks the memory for
that beside the state of a large model. Here a tensor crosses in pieces: what a save or a load adds
on the device is bounded by one piece, whatever the model's size. ``copy_`` between devices makes
temporaries of its own only where dtypes differ or a side is not contiguous
(``aten/src/ATen/native/cuda/Copy.cu``, ``copy_requires_temporaries``); the pieces that are given to
it here are alike in dtype and contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

PIECE = 64 * 2**20
"""Bytes of a piece, and of the buffer."""


def host_empty(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool = False) -> torch.Tensor:
    """A host tensor; saves and loads allocate all memory for values here."""
    return torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=pinned)


def on_host(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is in host memory, so that nothing has to be staged."""
    return tensor.device.type == "cpu"


class Staging:
    """Copies values to the host and back; its buffer is pinned where the values are CUDA's."""

    def __init__(self) -> None:
        self._bytes: torch.Tensor | None = None

    def to_host(
        self, source: torch.Tensor, dtype: torch.dtype, *, copy: bool = False
    ) -> torch.Tensor:
        """Values of ``source`` in ``dtype``, contiguous, in a storage that holds nothing else.

        Args:
            copy: never the tensor itself, as one that is on the host in this dtype already.

        Raises:
            torch.OutOfMemoryError: the device lacks memory for a piece.
        """
        source = source.detach()
        if on_host(source):
            alone = source.untyped_storage().nbytes() == source.numel() * source.itemsize
            if alone and source.is_contiguous() and source.dtype == dtype and not copy:
                return source
        if "dequantize" in type(source).__dict__:
            # TransformerEngine's low-precision weights, which Megatron's writer unpacks as well.
            source = source.dequantize()
        host = host_empty(source.shape, dtype)
        for there, here in pieces(source, host):
            self.piece_to_host(there, here)
        return host

    def piece_to_host(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy at most one piece from wherever it is to the host, and cast there."""
        if on_host(source):
            target.copy_(source)
            return
        buffer = self._buffer(source, source.dtype)
        buffer.copy_(source.contiguous())
        target.copy_(buffer)

    def to_live(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Set ``target``, wherever it is, from values on the host; cast there.

        Raises:
            torch.OutOfMemoryError: the device lacks memory for a piece.
        """
        target = target.detach()
        if on_host(target) or "dequantize" in type(target).__dict__:
            target.copy_(source)
            return
        for here, there in pieces(source, target):
            buffer = self._buffer(there, there.dtype)
            buffer.copy_(here)
            there.copy_(buffer if there.is_contiguous() else buffer.to(there.device))

    def _buffer(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The buffer as a tensor of the shape of ``like``, which is on a device."""
        if self._bytes is None:
            self._bytes = host_empty([PIECE], torch.uint8, pinned=like.is_cuda)
        size = like.numel() * dtype.itemsize
        return self._bytes[:size].view(dtype).view(like.shape)


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same parts of tensors of one shape, views of at most a piece; flat if contiguous."""
    first = tensors[0]
    limit = PIECE // max(tensor.itemsize for tensor in tensors)
    if all(tensor.is_contiguous() for tensor in tensors):
        flat = [tensor.view(-1) for tensor in tensors]
        for begin in range(0, first.numel(), limit):
            yield tuple(tensor[begin : begin + limit] for tensor in flat)
    elif first.numel() <= limit:
        yield tensors
    elif first.dim() == 1:
        for begin in range(0, first.numel(), limit):
            yield tuple(tensor[begin : begin + limit] for tensor in tensors)
    else:
        for row in range(first.shape[0]):
            yield from pieces(*(tensor[row] for tensor in tensors))
