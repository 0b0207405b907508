"""The products of grouped experts, looped and in one call, against torch's own derivative."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_train.backend.torch_kernels import devices, products
from moe_train.backend.torch_kernels.products import grouped_linear

COUNTS = ([3, 0, 5, 1], [0, 7, 0, 0], [0, 0, 0, 0], [8], [0, 0, 2])
LOOPED = devices.Device("cpu", lambda x: False, "", devices.DEVICES["cpu"].offsets, "")
FUSED = devices.Device("cpu", lambda x: True, "", devices.DEVICES["cpu"].offsets, "")
needs_cpu_backward = pytest.mark.skipif(
    devices._torch_version() < devices.GROUPED_CPU, reason="torch has no derivative on a CPU"
)


def operands(counts: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(len(counts) + sum(counts))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows, experts = sum(counts), len(counts)
    return (
        normal(rows, 16).requires_grad_(),
        normal(experts, 24, 16).requires_grad_(),
        normal(rows, 24),
    )


def answers(
    monkeypatch: pytest.MonkeyPatch,
    device: devices.Device,
    counts: list[int],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    x, weight, upstream = operands(counts, dtype)
    monkeypatch.setattr(products, "device_of", lambda tensor: device)
    output = grouped_linear(x, weight, counts)
    return [output, *torch.autograd.grad(output, (x, weight), upstream)]


@needs_cpu_backward
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
def test_both_ways_are_torchs_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, counts: list[int], dtype: torch.dtype
) -> None:
    x, weight, upstream = operands(counts, dtype)
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    theirs = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
    oracle = [theirs, *torch.autograd.grad(theirs, (x, weight), upstream)]
    for device in (LOOPED, FUSED):
        for mine, other in zip(answers(monkeypatch, device, counts, dtype), oracle, strict=True):
            assert mine.dtype == other.dtype and mine.shape == other.shape
            assert torch.equal(mine, other)


@pytest.mark.parametrize("counts", COUNTS)
def test_the_loop_is_the_definition(monkeypatch: pytest.MonkeyPatch, counts: list[int]) -> None:
    x, weight, upstream = operands(counts, torch.float32)
    parts = zip(x.split(counts), weight, strict=True)
    plain = torch.cat([rows @ matrix.t() for rows, matrix in parts])
    oracle = [plain, *torch.autograd.grad(plain, (x, weight), upstream, materialize_grads=True)]
    for mine, other in zip(
        answers(monkeypatch, LOOPED, counts, torch.float32), oracle, strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_an_expert_without_tokens_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernel leaves in its place: compute capability 10 leaves garbage."""
    x, weight, upstream = operands([3, 0, 5, 1], torch.float32)
    monkeypatch.setattr(products, "device_of", lambda tensor: FUSED)
    grouped = torch._grouped_mm

    def garbage(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        product = grouped(a, b, offs=offs)
        if product.dim() == 3:
            product[1] = float("nan")
        return product

    output = grouped_linear(x, weight, [3, 0, 5, 1])
    monkeypatch.setattr(torch, "_grouped_mm", garbage)
    output.backward(upstream)
    assert weight.grad is not None
    assert not weight.grad[1].any() and weight.grad[0].any()


def test_no_kernel_is_asked_for_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_grouped_mm", lambda *_, **__: pytest.fail("asked"))
    output, grad_x, grad_weight = answers(monkeypatch, FUSED, [0, 0], torch.float32)
    assert output.shape == (0, 24) and grad_x.shape == (0, 16)
    assert grad_weight.shape == (2, 24, 16) and not grad_weight.any()


def operand(kind: str, dtype: torch.dtype, index: int) -> Any:
    return SimpleNamespace(dtype=dtype, device=SimpleNamespace(type=kind, index=index))


@pytest.mark.parametrize(
    ("capability", "dtype", "grouped"),
    [
        ((9, 0), torch.bfloat16, True),
        ((10, 0), torch.bfloat16, True),
        ((10, 3), torch.bfloat16, True),
        ((8, 0), torch.bfloat16, False),
        ((12, 0), torch.bfloat16, False),
        ((9, 0), torch.float32, False),
    ],
)
def test_a_gpu_groups_what_it_has_a_kernel_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, grouped: bool
) -> None:
    devices._major.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    row = devices.device_of(operand("cuda", dtype, 3))
    assert row.grouped(operand("cuda", dtype, 3)) is grouped
    devices._major.cache_clear()


@pytest.mark.parametrize(
    ("version", "grouped"),
    [("2.11.0+cu130", False), ("2.13.1", True), ("2.15.0a0+git1", True), ("2.9.1", False)],
)
def test_a_cpu_groups_from_the_release_that_differentiates(
    monkeypatch: pytest.MonkeyPatch, version: str, grouped: bool
) -> None:
    devices._torch_version.cache_clear()
    monkeypatch.setattr(torch, "__version__", version)
    assert devices.DEVICES["cpu"].grouped(operand("cpu", torch.float32, 0)) is grouped
    devices._torch_version.cache_clear()


def test_offsets_of_a_gpu_come_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    class Pinned:
        def to(self, device: Any, **options: Any) -> str:
            made["to"] = (device, options)
            return "copy"

    def tensor(numbers: Any, **options: Any) -> Pinned:
        made["tensor"] = (numbers, options)
        return Pinned()

    monkeypatch.setattr(torch, "tensor", tensor)
    copy = devices.DEVICES["cuda"].offsets([1, 3], torch.device("cuda", 2))
    assert copy == "copy"  # type: ignore[comparison-overlap]
    assert made["tensor"] == ([1, 3], {"dtype": torch.int32, "pin_memory": True})
    assert made["to"] == (torch.device("cuda", 2), {"non_blocking": True})
