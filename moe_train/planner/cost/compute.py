"""Arithmetic and memory traffic of one layer, of the ends and of the optimizer, in seconds.

Operations are counted as in `moe_train.parallel.flops` (a multiply-add is 2; backward is
twice the forward pass), per rank and micro-batch. A product takes the longer of its arithmetic, at
a share of the peak, and its weights' way through memory (roofline: Williams, Waterman and
Patterson, 2009). Forward reads the weights; backward reads them once for the gradient of the
inputs, and a second product makes theirs:

    fused      reads and writes the gradient buffer (Megatron's gradient accumulation fusion)
    otherwise  writes a gradient of its own, which an addition then moves into the buffer
               (``DistributedDataParallel``'s hook: reads both, writes one)

Elementwise kernels write every tensor once and read it once. Their bytes are counted here, apart
from those of `moe_train.planner.memory`: a change of the memory model leaves every time as it is,
and so the layout that ``parallel=auto`` takes among those that fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.hardware import HardwareConfig
from moe_train.config.root import Config
from moe_train.parallel.optimizer_state import bytes_per_parameter
from moe_train.parallel.shapes import Shapes


@dataclass(frozen=True)
class Part:
    """One component's passes on one rank for one micro-batch."""

    name: str
    flops: float
    """Forward, useful ones; backward has twice as many."""
    seconds: float
    """Forward."""
    backward_seconds: float
    formula: str


def peak_flops(config: Config) -> float:
    """FLOP/s of one device in the compute dtype; 0 where the profile has none."""
    peaks = config.hardware.peak_tflops
    return 1e12 * peaks.get(config.dtype, peaks.get("bf16", 0.0) if config.dtype == "fp8" else 0.0)


def _bandwidth(hardware: HardwareConfig) -> float:
    return max(hardware.memory_gbps * hardware.memory_efficiency * 1e9, 1.0)


def _product(
    config: Config, z: Shapes, name: str, flops: float, share: float, weights: float, formula: str
) -> Part:
    """A product with `weights` parameters, which are all read."""
    rate, bandwidth = max(peak_flops(config) * share, 1.0), _bandwidth(config.hardware)
    once = max(flops / rate, weights * z.b / bandwidth)
    buffer = weights * bytes_per_parameter(config.dtype, config.optim).gradient
    if z.fused:
        gradient = max(flops / rate, 2 * buffer / bandwidth)
    else:
        gradient = once + _accumulated(config, z, weights)
    return Part(name, flops, once, once + gradient, formula)


def _scores(config: Config, z: Shapes) -> Part:
    """Fused attention. Its backward pass has 5 products for 2 (FlashAttention-2,
    arXiv:2307.08691, section 4.1), since it computes the scores again.
    """
    hardware, pairs = config.hardware, z.A * (config.data.sequence + 1) / 2
    flops = 2 * pairs * (z.Q + z.U)
    once = flops / max(peak_flops(config) * hardware.attention_efficiency, 1.0)
    softmax = 0.0
    if hardware.attention_exp_gops:
        # Small heads have few products for each exponential (FlashAttention-3,
        # arXiv:2407.08608, section 3.2).
        softmax = pairs * z.n / (hardware.attention_exp_gops * 1e9)
    return Part("scores", flops, once + softmax, 2.5 * (once + softmax), "A (Q + U) (S + 1)")


def _accumulated(config: Config, z: Shapes, weights: float) -> float:
    """Seconds to add `weights` parameters' own gradients to the buffer."""
    buffer = weights * bytes_per_parameter(config.dtype, config.optim).gradient
    return (weights * z.b + 2 * buffer) / _bandwidth(config.hardware)


def _moved(config: Config, name: str, size: float) -> Part:
    """Elementwise kernels that move `size` bytes forward and twice as many backward."""
    once = size / _bandwidth(config.hardware)
    return Part(name, 0.0, once, 2 * once, "2 x saved bytes")


def _launches(forward: float, backward: float) -> Part:
    return Part("launches", 0.0, forward, backward, "hardware profile")


def _norm_bytes(z: Shapes) -> int:
    """Output of an RMSNorm and 1 / rms of each row; torch's own makes two fp32 copies."""
    return z.N * (z.H * z.b + 4) if z.fused else z.N * (8 * z.H + 4)


def _qk_norm_bytes(z: Shapes) -> int:
    """The same of the norms of queries and keys."""
    if z.qk_norm == "none":
        return 0
    if z.qk_norm == "full":
        # fp32 copies of the input and of its squares, and the output (model/qk_norm).
        return z.A * ((8 + z.b) * (z.Q + z.G) + 16)
    scales = 4 * z.A * (z.n + z.G // z.D)
    return z.A * (z.Q + z.G) * (z.b if z.fused else 8) + scales


def _written_bytes(z: Shapes) -> int:
    """Bytes that the kernels of one layer write between its products, experts apart."""
    attention = z.A * (3 * z.Q + 3 * z.G) * z.b + 4 * z.T * z.D * z.b + 4 * z.A * z.n
    attention += _qk_norm_bytes(z)
    router = z.N * (4 * z.E + 20 * z.K + 8)
    permutation = 4 * z.N * (2 * z.E + 1)
    if not z.fused:
        permutation = 8 * z.N * (z.E + z.K) + z.N * z.K * z.H * z.b
    inputs, shared = 2 * z.N * z.H * z.b, 3 * z.A * z.W * z.b
    return 2 * _norm_bytes(z) + inputs + attention + router + permutation + shared


def dense_parts(config: Config, z: Shapes) -> list[Part]:
    """Attention, norms, router and shared expert of one layer, forward."""
    hardware = config.hardware
    parts = [
        _product(config, z, "projections", 2 * z.A * z.P, hardware.gemm_efficiency, z.P, "2 A P"),
        _scores(config, z),
        _product(config, z, "router", 2 * z.N * z.H * z.E, hardware.gemm_efficiency / 2,
                 z.H * z.E, "2 N H E, in fp32"),
    ]  # fmt: skip
    if z.C:
        parts.append(
            _product(config, z, "latents", 2 * z.N * z.H * z.C, hardware.gemm_efficiency,
                     z.H * z.C, "2 N H C")
        )  # fmt: skip
    if z.W:
        parts.append(
            _product(config, z, "shared expert", 6 * z.A * z.H * z.W, hardware.gemm_efficiency,
                     3 * z.H * z.W, "6 A H W")
        )  # fmt: skip
    parts.append(_moved(config, "norms and other kernels", 2 * _written_bytes(z)))
    once = hardware.layer_overhead_us * 1e-6
    parts.append(_launches(once, 2 * once))
    return parts


def expert_parts(config: Config, z: Shapes, share: float = 1.0, layers: int = 1) -> list[Part]:
    """Routed experts for `share` of the R rows.

    Under ``placement=span`` these belong to `layers` layers, one of each active stage.
    """
    hardware, rows = config.hardware, z.R * share
    # Input, both halves of fc1, the product of SwiGLU and the probability of every row; then the
    # buffers that are sent and received.
    swiglu = rows * z.H * z.b + 2 * rows * z.F * z.b + rows * z.F * z.b + 4 * rows
    exchanged = z.N * z.K * z.H * z.b + z.R * z.H * z.b
    moved = 2 * swiglu + 2 * share * exchanged
    modules = layers * z.local_experts
    once = modules * hardware.expert_overhead_us * 1e-6
    return [
        _product(config, z, "experts", 6 * rows * z.H * z.F, hardware.grouped_efficiency,
                 modules * 3 * z.H * z.F, "6 R H F"),
        _moved(config, "permutation and SwiGLU", moved),
        _launches(once, 2 * once),
    ]  # fmt: skip


def embedding_parts(config: Config, z: Shapes) -> list[Part]:
    """Look-up of the tokens' rows on the first stage; its gradient is a whole table."""
    bandwidth = _bandwidth(config.hardware)
    rows, table = 2 * z.A * z.H * z.b / bandwidth, z.V * z.H
    back = rows + table * z.b / bandwidth + _accumulated(config, z, table)
    return [Part("embedding", 0.0, rows, back, "2 A H b; backward V H")]


def head_parts(config: Config, z: Shapes) -> list[Part]:
    """Output projection and loss on the last stage."""
    loss = _norm_bytes(z) + z.N * z.H * z.b + 4 * z.A * z.V + 9 * z.A
    # The profile has both passes together.
    launches = config.hardware.microbatch_overhead_us * 1e-6
    return [
        _product(config, z, "head", 2 * z.A * z.H * z.V, config.hardware.gemm_efficiency,
                 z.H * z.V, "2 A H V"),
        _moved(config, "loss", 2 * loss),
        _launches(launches / 3, 2 * launches / 3),
    ]  # fmt: skip


def seconds(parts: list[Part]) -> float:
    """Forward seconds: the parts run one after the other."""
    return sum(part.seconds for part in parts)


def backward_seconds(parts: list[Part]) -> float:
    """Backward seconds, without recomputation."""
    return sum(part.backward_seconds for part in parts)


def optimizer_seconds(config: Config, held: int, owned: int) -> float:
    """The optimizer's step on one rank.

    Gradients are zeroed where they are `held` (parameters); where a rank has optimizer state
    (`owned`) they are read for the norm, scaled by clipping and read by the update, which reads and
    writes its state and writes the weights. Without a master copy the weights are read as well.
    """
    each = bytes_per_parameter(config.dtype, config.optim)
    weight = each.weight if each.master else 2 * each.weight
    clip = 2 if config.optim.clip else 0
    moved = held * each.gradient
    moved += owned * ((2 + clip) * each.gradient + 2 * each.state + weight)
    return moved / _bandwidth(config.hardware)
