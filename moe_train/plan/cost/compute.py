"""Arithmetic and memory traffic of one layer, of the head and of the optimizer, in seconds.

Operations are counted as in `moe_train.plan.quantities.flops` (a multiply-add is 2; backward is
twice the forward pass), per rank and micro-batch. A part takes the longer of its arithmetic, at a
share of the peak, and its weights' way through memory (roofline: Williams, Waterman and Patterson,
2009).
Elementwise kernels move every tensor that the layer saves twice: written once, read once.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.hardware import HardwareConfig
from moe_train.config.root import Config
from moe_train.plan.memory.activations import dense_terms, expert_terms, head_terms, routing_terms
from moe_train.plan.memory.layers import forward_buffers
from moe_train.plan.quantities.shapes import Shapes
from moe_train.plan.quantities.terms import total


@dataclass(frozen=True)
class Part:
    """One component's forward pass on one rank for one micro-batch."""

    name: str
    flops: float
    seconds: float
    formula: str


def peak_flops(config: Config) -> float:
    """FLOP/s of one device in the compute dtype; 0 where the profile has none."""
    peaks = config.hardware.peak_tflops
    return 1e12 * peaks.get(config.dtype, peaks.get("bf16", 0.0) if config.dtype == "fp8" else 0.0)


def _bandwidth(hardware: HardwareConfig) -> float:
    return max(hardware.memory_gbps * hardware.memory_efficiency * 1e9, 1.0)


def _part(
    config: Config, name: str, flops: float, share: float, weights: float, formula: str
) -> Part:
    rate = max(peak_flops(config) * share, 1.0)
    return Part(name, flops, max(flops / rate, weights / _bandwidth(config.hardware)), formula)


def dense_parts(config: Config, z: Shapes) -> list[Part]:
    """Attention, norms, router and shared expert of one layer, forward."""
    hardware, sequence = config.hardware, config.data.sequence
    width = 2 * z.Q + 2 * z.G
    parts = [
        _part(config, "projections", 2 * z.A * z.H * width, hardware.gemm_efficiency,
              z.H * width * z.b, "2 A H (2 Q + 2 G)"),
        _part(config, "scores", 2 * 2 * z.A * z.Q * (sequence + 1) / 2,
              hardware.attention_efficiency, 0.0, "2 A Q (S + 1), causal"),
        _part(config, "router", 2 * z.N * z.H * z.E, hardware.gemm_efficiency / 2,
              z.H * z.E * z.b, "2 N H E, in fp32"),
    ]  # fmt: skip
    if z.W:
        parts.append(
            _part(config, "shared expert", 6 * z.A * z.H * z.W, hardware.gemm_efficiency,
                  3 * z.H * z.W * z.b, "6 A H W")
        )  # fmt: skip
    moved = 2 * total([*dense_terms(z), *routing_terms(z)])
    parts.append(Part("norms and other kernels", 0.0, moved / _bandwidth(hardware),
                      "2 x saved bytes"))  # fmt: skip
    parts.append(Part("launches", 0.0, hardware.layer_overhead_us * 1e-6, "hardware profile"))
    return parts


def expert_parts(config: Config, z: Shapes, share: float = 1.0, layers: int = 1) -> list[Part]:
    """Routed experts, forward, for `share` of the R rows.

    Under ``placement=span`` these belong to `layers` layers, one of each active stage.
    """
    hardware, rows = config.hardware, z.R * share
    moved = 2 * total(expert_terms(z, rows)) + 2 * share * total(forward_buffers(z))
    return [
        _part(config, "experts", 6 * rows * z.H * z.F, hardware.grouped_efficiency,
              layers * z.local_experts * 3 * z.H * z.F * z.b, "6 R H F"),
        Part("permutation and SwiGLU", 0.0, moved / _bandwidth(hardware), "2 x saved bytes"),
        Part("launches", 0.0, layers * z.local_experts * hardware.expert_overhead_us * 1e-6,
             "hardware profile"),
    ]  # fmt: skip


def head_parts(config: Config, z: Shapes) -> list[Part]:
    """Output projection and loss on the last stage, forward."""
    moved = 2 * total(head_terms(z))
    return [
        _part(config, "head", 2 * z.A * z.H * z.V, config.hardware.gemm_efficiency,
              z.H * z.V * z.b, "2 A H V"),
        Part("loss", 0.0, moved / _bandwidth(config.hardware), "2 x saved bytes"),
        # The profile has both passes together, and a backward pass is counted twice.
        Part("launches", 0.0, config.hardware.microbatch_overhead_us * 1e-6 / 3,
             "hardware profile"),
    ]  # fmt: skip


def seconds(parts: list[Part]) -> float:
    """Sum of the parts' seconds: they run one after the other."""
    return sum(part.seconds for part in parts)


def optimizer_seconds(config: Config, touched: float) -> float:
    """Adam's step on one rank: `touched` bytes of state, gradients and weights, both ways."""
    return touched / _bandwidth(config.hardware)
