"""TransformerEngine's grouped linear with an expert that no token chose."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from moe_train.gpu_check.findings import Skip

COUNTS = (64, 0, 128, 0)


def zero_rows(hidden: int, inner: int, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    """Run a grouped linear with fused weight gradients on counts that hold zeros.

    Returns:
        Largest relative differences of output, input gradient and accumulated weight gradients
        from products made one by one; the expert without rows must have a gradient of zero.
    """
    try:
        te = importlib.import_module("transformer_engine.pytorch")
    except ImportError as missing:
        raise Skip(f"TransformerEngine does not import: {missing}") from missing
    counts = list(counts)
    device = torch.device(torch.cuda.current_device())
    torch.manual_seed(1)
    layer = te.GroupedLinear(
        len(counts),
        hidden,
        inner,
        bias=False,
        params_dtype=torch.bfloat16,
        device=device,
        fuse_wgrad_accumulation=True,
    )
    weights = [getattr(layer, f"weight{index}") for index in range(len(counts))]
    for weight in weights:
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    x = torch.randn(sum(counts), hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    out = layer(x, counts)
    out = out[0] if isinstance(out, tuple) else out
    gradient = torch.randn_like(out)
    out.backward(gradient)
    parts = zip(weights, x.detach().split(counts), gradient.split(counts), strict=True)
    outputs, inputs, worst = [], [], 0.0
    for weight, rows, upper in parts:
        w = weight.detach().float()
        outputs.append(rows.float() @ w.t())
        inputs.append(upper.float() @ w)
        expected = upper.float().t() @ rows.float()
        worst = max(worst, _relative(weight.main_grad, expected))
    assert x.grad is not None
    return {
        "output": _relative(out, torch.cat(outputs)),
        "input_gradient": _relative(x.grad, torch.cat(inputs)),
        "weight_gradient": worst,
    }


def _relative(a: Any, b: Any) -> float:
    """Largest difference over the largest value of ``b``, or the difference where that is 0."""
    if b.numel() == 0:
        return 0.0
    scale = float(b.abs().max()) or 1.0
    return float((a.detach().float() - b).abs().max()) / scale
