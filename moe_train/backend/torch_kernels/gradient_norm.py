"""The gradient norm, exact enough to compare layouts by, and clipping without copies.

torch's fp32 norm on a CPU adds long tensors up element by element in a few lanes: 1e-6 relative
error at 2^18 elements, 9e-5 at 2^22, different for every way of cutting the tensor. Adding up in
two levels keeps it near 1e-7 at the same speed.

Gradients are read in pieces: an fp32 copy of one 16-bit matrix of merged experts would be 2.4 GB
for the 30B.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

ROW = 256
PIECE = ROW << 16
"""Elements that are converted to fp32 at once (64 MiB)."""


def l2_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """L2 norm of all elements of ``tensors`` together, a float64 scalar."""
    squares = [_square_norm(tensor) for tensor in tensors]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


def multi_tensor_l2_norm(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Sequence[Sequence[torch.Tensor]],
    per_tensor: bool,
    *_: object,
) -> tuple[torch.Tensor, None]:
    """:func:`l2_norm` with the interface of the multi-tensor kernels; shape [1], fp32."""
    assert not per_tensor, "norms of single tensors are not computed"
    return l2_norm(t for tensors in tensor_lists for t in tensors).float().view(1), None


def multi_tensor_scale(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Sequence[Sequence[torch.Tensor]],
    scale: float,
) -> None:
    """Write ``scale`` times the first list's tensors to the second's, with the kernels' interface.

    Megatron clips gradients in place: both lists are then the same, and no copy is made.
    """
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)


def _square_norm(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    whole = flat.numel() - flat.numel() % ROW
    norms = [
        torch.linalg.vector_norm(piece.float().view(-1, ROW), dim=1)
        for piece in flat[:whole].split(PIECE)
    ]
    rows = norms[0] if len(norms) == 1 else torch.cat(norms)
    rest = torch.linalg.vector_norm(flat[whole:].float())
    return rows.double().square().sum() + rest.double().square()
