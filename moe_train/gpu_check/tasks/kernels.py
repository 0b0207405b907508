"""Single kernels, timed: matrix products, grouped products by rows, attention by backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

ROUNDS = 10


def _device() -> Any:
    if torch.cuda.is_available():
        return torch.device(torch.cuda.current_device())
    return torch.device("cpu")


def seconds(function: Callable[[], Any]) -> float:
    """Mean time of a call, after two that do not count; device work included."""
    return float(Timer("function()", globals={"function": function}).timeit(ROUNDS).mean)


def matrix(size: int) -> list[dict[str, Any]]:
    """A square product in each dtype, and a copy: what the hardware profile takes as the peak."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=_device(), dtype=dtype) for _ in range(2))
        took = seconds(partial(torch.matmul, a, b))
        rows.append({"what": f"product {size}^3 {_name(dtype)}", "ms": took * 1e3,
                     "tflops": 2 * size**3 / took / 1e12})  # fmt: skip
    source = torch.empty(16 * size * size, dtype=torch.uint8, device=_device())
    target = torch.empty_like(source)
    took = seconds(partial(target.copy_, source))
    rows.append({"what": "copy", "ms": took * 1e3, "gbps": 2 * source.numel() / took / 1e9})
    return rows


def grouped(experts: int, hidden: int, inner: int, rows: list[int]) -> list[dict[str, Any]]:
    """The first expert product by rows an expert: forward, and both gradients; bf16."""
    device = _device()
    weight = torch.randn(experts, 2 * inner, hidden, device=device, dtype=torch.bfloat16)
    weight = (weight * 0.02).requires_grad_()
    results = []
    for count in rows:
        total = count * experts
        x = torch.randn(total, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * count

        def forward(x: Any = x, ends: Any = ends) -> Any:
            return torch._grouped_mm(x, weight.transpose(-2, -1), offs=ends)

        work = 2 * total * hidden * 2 * inner / 1e12
        results.append({"rows": count, **_rates(forward, (x, weight), work, 2 * work)})
    return results


def attention(sequences: int, heads: int, tokens: int, width: int) -> list[dict[str, Any]]:
    """Causal attention forward and backward by backend, and as torch chooses; bf16."""
    shape = (sequences, heads, tokens, width)
    q, k, v = (
        torch.randn(shape, device=_device(), dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    work = 2 * 2 * sequences * heads * tokens**2 * width / 2 / 1e12
    choices = {"chosen by torch": None, **dict(SDPBackend.__members__)}
    results = []
    for name, backend in choices.items():
        if name in ("ERROR", "OVERRIDEABLE"):
            continue

        def forward(backend: Any = backend) -> Any:
            if backend is None:
                return scaled_dot_product_attention(q, k, v, is_causal=True)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True)

        # Five products in the backward pass where the forward pass has two.
        results.append({"backend": name, **_rates(forward, (q, k, v), work, 2.5 * work)})
    return results


def _rates(
    forward: Callable[[], Any], inputs: tuple[Any, ...], work: float, backward_work: float
) -> dict[str, Any]:
    """Times and rates of both passes (work in 1e12 FLOP), or why they do not run."""
    row: dict[str, Any] = {}
    try:
        row |= _rate("forward", seconds(forward), work)
        out = forward()
        gradient = torch.randn_like(out)
        backward = partial(torch.autograd.grad, out, inputs, gradient, retain_graph=True)
        row |= _rate("backward", seconds(backward), backward_work)
    # One size or backend that this card or this torch does not take leaves the others.
    except RuntimeError as error:
        row["error"] = str(error).splitlines()[0][:200]
    return row


def _rate(what: str, took: float, tflop: float) -> dict[str, float]:
    return {f"{what}_ms": took * 1e3, f"{what}_tflops": tflop / took}


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
