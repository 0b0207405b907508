"""The gradient norm in pieces: the same value, and little memory beside the gradient."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from moe_train.backend.torch_kernels import gradient_norm
from moe_train.measure.dryrun.tracker import MemoryTracker


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 255, 256, 10_000, 10 * 256])
def test_pieces_change_no_bit(size: int, dtype: torch.dtype) -> None:
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    whole = gradient_norm.l2_norm([gradient])
    with mock.patch.object(gradient_norm, "PIECE", 3 * gradient_norm.ROW):
        assert float(gradient_norm.l2_norm([gradient])).hex() == float(whole).hex()
    assert float(whole) == pytest.approx(float(gradient.double().norm()), rel=1e-6)


def test_a_16_bit_gradient_is_converted_piece_by_piece() -> None:
    gradient = torch.ones(1_000_000, dtype=torch.bfloat16)

    def added() -> int:
        with MemoryTracker() as tracker:
            tracker.own([gradient], "gradients")
            before = tracker.live
            tracker.begin()
            gradient_norm.l2_norm([gradient])
            return tracker.peak().bytes - before

    assert added() >= 4 * gradient.numel()
    with mock.patch.object(gradient_norm, "PIECE", 40 * gradient_norm.ROW):
        assert added() < gradient.numel() / 10
