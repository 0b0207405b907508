"""RMSNorm over all heads on one rank is torch's; on several ranks it is that of one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_train.config.compose import compose
from moe_train.parallel.parameters import layer_parameters
from moe_train.testing.world import run_world

S, B, D, EPS = 5, 3, 6, 1e-3


def inputs(heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, weight and gradient of the result; all heads."""
    generator = torch.Generator().manual_seed(heads)
    x, grad = (torch.randn(S, B, heads, D, generator=generator) * 3 for _ in range(2))
    return x, torch.rand(heads * D, generator=generator) + 0.5, grad


def oracle(heads: int) -> tuple[torch.Tensor, ...]:
    x, weight, grad = inputs(heads)
    x.requires_grad_()
    weight.requires_grad_()
    y = torch.nn.functional.rms_norm(x.flatten(2), [heads * D], weight, EPS).view_as(x)
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


def _norm(rank: int, world: int, heads: int) -> Any:
    import torch.distributed as dist

    from moe_train.backend.cpu.backend import CpuBackend
    from moe_train.backend.groups import open_world
    from moe_train.config.training import BackendConfig

    backend = CpuBackend(BackendConfig())
    backend.prepare()
    open_world(backend, rank, world, 60)
    from moe_train.model.qk_norm import FullWidthNorm

    config: Any = SimpleNamespace(
        params_dtype=torch.float32, use_cpu_initialization=True, sequence_parallel=world > 1
    )
    norm = FullWidthNorm(config, heads=heads, group=dist.group.WORLD, hidden_size=D, eps=EPS)
    x, weight, grad = inputs(heads)
    with torch.no_grad():
        norm.weight.copy_(weight)
    # Ranks that share a head each have a part of the gradient of what they share.
    local, copies = max(heads // world, 1), max(world // heads, 1)
    begin = rank * heads // world
    x = x[:, :, begin : begin + local].clone().requires_grad_()
    y = norm(x)
    y.backward(grad[:, :, begin : begin + local] / copies)
    assert x.grad is not None and norm.weight.grad is not None
    dist.all_reduce(norm.weight.grad)
    return begin, y.detach().numpy(), x.grad.numpy(), norm.weight.grad.numpy()


@pytest.mark.world
@pytest.mark.parametrize(("world", "heads"), [(1, 4), (4, 8), (4, 2)])
def test_full_width(world: int, heads: int) -> None:
    y, x_grad, weight_grad = (tensor.numpy() for tensor in oracle(heads))
    ours = np.zeros_like(y)
    gradient = np.zeros_like(y)
    for begin, part, part_grad, weights in run_world(_norm, world, heads):
        place = slice(begin, begin + part.shape[2])
        ours[:, :, place] = part
        gradient[:, :, place] += part_grad
        np.testing.assert_allclose(weights, weight_grad, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours, y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, x_grad, rtol=1e-4, atol=1e-5)


def test_parameters_are_counted() -> None:
    """Qwen3-30B-A3B's norms are 2 x 128 weights a layer, OLMoE's 2 x 2048."""
    qwen = ["model.hidden=2048", "model.heads=32", "model.kv_heads=4", "model.head_dim=128"]
    olmoe = ["model.hidden=2048", "model.heads=16", "model.head_dim=128"]
    for overrides, norm, weights in ((qwen, "head", 256), (olmoe, "full", 4096)):
        counts = [
            layer_parameters(compose([*overrides, f"model.qk_norm={one}"]).model).replicated
            for one in ("none", norm)
        ]
        assert counts[1] - counts[0] == weights
