"""Arithmetic and memory traffic of one layer, of the ends and of the optimizer, in seconds.

Operations are counted as in `moe_train.parallel.flops` (a multiply-add is 2; backward is
twice the forward pass), per rank and micro-batch. A product takes the longer of its arithmetic, at
a share of the peak, and its weights' way through memory (roofline: Williams, Waterman and
Patterson, 2009). Forward reads the weights; backward reads them once for the gradient of the
inputs, and a second product makes theirs:

    fused      reads and writes the gradient buffer (Megatron's gradient accumulation fusion)
    otherwise  writes a gradient of its own, which an addition then moves into the buffer
               (``DistributedDataParallel``'s hook: reads both, writes one)

Grouped products lose half a tile of rows an expert on average: with r rows they reach
r / (r + tile / 2) of their share of the peak.

In fp8 the products of TransformerEngine's layers are at the fp8 peak, attention and head in bf16.
Each cast reads a product's input, or the gradient of its output, in bf16, twice where the scale is
the tensor's own, and writes it twice, as it is and transposed. The router's logits come of bf16
inputs; their backward products are fp32 by TF32, at half of the bf16 peak (NVIDIA's A100 and H100
data sheets), or at the fp32 peak without TransformerEngine (``RouterGatingLinearFunction`` in
Megatron-Core's moe_utils.py).

Over c parts of a sequence attention is c steps. Each rank has a chunk from the front and its mirror
image from the back (Megatron's ``get_batch_on_this_cp_rank``), so that every step has as many
pairs on every rank: one step its own causal square, the others half of the keys or half of the
queries (TransformerEngine's context_parallel.py). Elementwise kernels merge what they give.

Elementwise kernels write every tensor once and read it once. Their bytes are counted here, apart
from those of `moe_train.planner.memory`: a change of the memory model leaves every time as it is,
and so the layout that ``parallel=auto`` takes among those that fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_train.config.hardware import HardwareConfig
from moe_train.config.root import Config
from moe_train.parallel.optimizer_state import bytes_per_parameter
from moe_train.parallel.shapes import Shapes
from moe_train.planner.cost.constants import constants

CAST = 6
"""Bytes that an fp8 cast moves for each element: 2 read for the scale, 2 read again, 1 written and
1 more transposed."""


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


def _half_peak(config: Config) -> float:
    """FLOP/s of what stays in bf16 in an fp8 run; of another run its own dtype's."""
    bf16 = config.hardware.peak_tflops.get("bf16", 0.0)
    return 1e12 * bf16 if config.dtype == "fp8" and bf16 else peak_flops(config)


def _bandwidth(hardware: HardwareConfig) -> float:
    return max(hardware.memory_gbps * hardware.memory_efficiency * 1e9, 1.0)


def _product(
    config: Config,
    z: Shapes,
    name: str,
    flops: float,
    share: float,
    weights: float,
    formula: str,
    *,
    peak: float | None = None,
    fused: bool | None = None,
    again: bool = False,
) -> Part:
    """A product with `weights` parameters, which are all read.

    Args:
        peak: FLOP/s where they are not the compute dtype's.
        fused: whether it adds its weights' gradient to the buffer itself.
        again: whether the backward pass computes it once more (selective recomputation).
    """
    peak = peak_flops(config) if peak is None else peak
    rate = max(peak * share, 1.0)
    bandwidth = _bandwidth(config.hardware)
    once = max(flops / rate, weights * z.b / bandwidth)
    buffer = weights * bytes_per_parameter(config.dtype, config.optim).gradient
    if z.fused if fused is None else fused:
        gradient = max(flops / rate, 2 * buffer / bandwidth)
    else:
        gradient = once + _accumulated(config, z, weights)
    return Part(name, flops, once, once + gradient + again * once, formula)


def _router(config: Config, z: Shapes, again: bool) -> Part:
    """Logits of all experts; a narrow product reaches half of the usual share."""
    share, name = config.hardware.gemm_efficiency / 2, "router"
    flops, formula = 2.0 * z.N * z.H * z.E, "2 N H E, in fp32"
    if config.hardware.kind == "cpu":
        return _product(config, z, name, flops, share, z.H * z.E, formula, again=again)
    half, exact = _half_peak(config), 1e12 * config.hardware.peak_tflops.get("fp32", 0.0)
    ahead, back = (half, half / 2) if z.fused else (exact, exact)
    weights, fused = z.H * z.E, False
    first = _product(config, z, name, flops, share, weights, formula, peak=ahead, fused=fused)
    then = _product(config, z, name, flops, share, weights, formula, peak=back, fused=fused)
    backward = then.backward_seconds + again * first.seconds
    return Part(name, flops, first.seconds, backward, formula)


def _projections(config: Config, z: Shapes) -> Part:
    share = config.hardware.gemm_efficiency
    part = _product(config, z, "projections", 2.0 * z.A * z.P, share, z.P, "2 A P")
    if "mla_up_proj" not in config.recompute.modules:
        return part
    # All but the output projection.
    up = part.seconds * (1 - z.U * z.H / z.P)
    return replace(part, backward_seconds=part.backward_seconds + up)


def _casts(config: Config, inputs: float, outputs: float) -> Part:
    """Casts of fp8 products with so many elements of input and of output."""
    elements = (inputs, outputs) if config.dtype == "fp8" else (0.0, 0.0)
    rate = _bandwidth(config.hardware) / constants(config.hardware).elementwise
    ahead, back = (CAST * count / rate for count in elements)
    return Part("fp8 casts", 0.0, ahead, back, "6 bytes an element of input, then of output")


def _scores(config: Config, z: Shapes) -> Part:
    """Fused attention, in bf16 where products are in fp8. Its backward pass has 5 products for 2
    (FlashAttention-2, arXiv:2307.08691, section 4.1), since it computes the scores again.
    """
    hardware, pairs = config.hardware, z.A * (config.data.sequence + 1) / 2
    flops = 2 * pairs * (z.Q + z.U)
    once = flops / max(_half_peak(config) * hardware.attention_efficiency, 1.0)
    softmax = 0.0
    if hardware.attention_exp_gops:
        # Small heads have few products for each exponential (FlashAttention-3,
        # arXiv:2407.08608, section 3.2).
        softmax = pairs * z.n / (hardware.attention_exp_gops * 1e9)
    again = once + softmax if "core_attn" in config.recompute.modules else 0.0
    back = 2.5 * (once + softmax) + again
    return Part("scores", flops, once + softmax, back, "A (Q + U) (S + 1)")


def ring_steps(config: Config, parts: list[Part], z: Shapes) -> tuple[float, float]:
    """Seconds of a forward and of a backward step of attention, `parts` being a layer's."""
    scores = next(part for part in parts if part.name == "scores")
    repeated = scores.seconds if "core_attn" in config.recompute.modules else 0.0
    return scores.seconds / z.c, (scores.backward_seconds - repeated) / z.c


def _merged(config: Config, z: Shapes) -> Part:
    """Merging of a ring's partial results (TransformerEngine's context_parallel.py).

    Forward K and V are joined for the messages and the first output is scaled; each further step
    corrects the log-sum and adds its output. Backward K, V and the first gradients are copied, and
    each further step adds its own. On average a further step has 3/4 of the queries and of the
    keys: half of the steps have all queries and half of the keys, the others the reverse.
    """
    outputs, sums = z.A * z.U * z.b, 4 * z.A * z.n
    queries, both = z.A * z.Q * z.b, 2 * z.A * z.G * z.b
    further = 0.75 * (z.c - 1)
    ahead = 2 * (both + outputs + sums) + further * (3 * outputs + 5 * sums)
    back = 2 * (2 * both + queries) + further * 3 * (queries + both)
    again = ahead if "core_attn" in config.recompute.modules else 0.0
    rate = _bandwidth(config.hardware) / constants(config.hardware).elementwise
    formula = "9/4 (c - 1) A U b and once 2 A (2 G + U) b"
    return Part("merges of ring steps", 0.0, ahead / rate, (back + again) / rate, formula)


def _accumulated(config: Config, z: Shapes, weights: float) -> float:
    """Seconds to add `weights` parameters' own gradients to the buffer."""
    buffer = weights * bytes_per_parameter(config.dtype, config.optim).gradient
    return (weights * z.b + 2 * buffer) / _bandwidth(config.hardware)


def _moved(config: Config, name: str, size: float, again: float = 0.0) -> Part:
    """Elementwise kernels: `size` bytes forward, twice as many and `again` backward."""
    rate = _bandwidth(config.hardware) / constants(config.hardware).elementwise
    return Part(name, 0.0, size / rate, (2 * size + again) / rate, "2 x saved bytes")


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
    hardware, modules = config.hardware, config.recompute.modules
    # Under span the schedule repeats the experts of a recomputed MoE layer.
    moe = "moe" in modules and not z.span
    parts = [
        _projections(config, z),
        _scores(config, z),
        _router(config, z, moe),
    ]  # fmt: skip
    if z.c > 1:
        parts.append(_merged(config, z))
    if z.C:
        parts.append(
            _product(config, z, "latents", 2 * z.N * z.H * z.C, hardware.gemm_efficiency,
                     z.H * z.C, "2 N H C")
        )  # fmt: skip
    inputs, outputs = z.A * (z.H + z.U), z.A * (z.Q + 2 * z.G + z.H)
    if z.W:
        parts.append(
            _product(config, z, "shared expert", 6 * z.A * z.H * z.W, hardware.gemm_efficiency,
                     3 * z.H * z.W, "6 A H W", again=moe or "shared_experts" in modules)
        )  # fmt: skip
        inputs, outputs = inputs + z.A * (z.H + z.W), outputs + z.A * (2 * z.W + z.H)
    parts.append(_casts(config, inputs, outputs))
    norms = 4 * _norm_bytes(z) if "layernorm" in modules else 0
    parts.append(_moved(config, "norms and other kernels", 2 * _written_bytes(z), norms))
    once = hardware.layer_overhead_us * 1e-6
    parts.append(_launches(once, 2 * once))
    return parts


def grouped_share(hardware: HardwareConfig, rows: float) -> float:
    """Share of the peak that grouped products of `rows` rows an expert reach."""
    share = hardware.grouped_efficiency
    if not hardware.tile_rows:
        return share
    return share * rows / (rows + hardware.tile_rows / 2)


def expert_parts(config: Config, z: Shapes, share: float = 1.0, layers: int = 1) -> list[Part]:
    """Routed experts for `share` of the R rows.

    Under ``placement=span`` these belong to `layers` layers, one of each active stage.
    """
    hardware, rows, chosen = config.hardware, z.R * share, config.recompute.modules
    again = "moe" in chosen and not z.span
    # Input, both halves of fc1, the product of SwiGLU and the probability of every row; then the
    # buffers that are sent and received.
    # TransformerEngine's fused grouped MLP has SwiGLU and its casts inside the products.
    fused = bool(config.megatron.transformer.get("use_transformer_engine_op_fuser", False))
    activation = 0.0 if fused else 3 * rows * z.F * z.b
    inner = 0 if fused else z.F
    swiglu = rows * z.H * z.b + activation + 4 * rows
    exchanged = z.N * z.K * z.H * z.b + z.R * z.H * z.b
    moved = 2 * swiglu + 2 * share * exchanged
    repeated = moved if again else activation if "moe_act" in chosen else 0.0
    modules = layers * z.local_experts
    once = modules * hardware.expert_overhead_us * 1e-6
    reached = grouped_share(hardware, rows / modules)
    return [
        _product(config, z, "experts", 6 * rows * z.H * z.F, reached,
                 modules * 3 * z.H * z.F, "6 R H F", again=again),
        _casts(config, rows * (z.H + inner), rows * (2 * inner + z.H)),
        _moved(config, "permutation and SwiGLU", moved, repeated),
        _launches(once, 2 * once),
    ]  # fmt: skip


def embedding_parts(config: Config, z: Shapes) -> list[Part]:
    """Look-up of the tokens' rows on the first stage; its gradient is a whole table."""
    bandwidth = _bandwidth(config.hardware)
    rows, table = 2 * z.A * z.H * z.b / bandwidth, z.V * z.H
    back = rows + table * z.b / bandwidth + _accumulated(config, z, table)
    return [Part("embedding", 0.0, rows, back, "2 A H b; backward V H")]


def head_parts(config: Config, z: Shapes) -> list[Part]:
    """Output projection, in bf16, and loss on the last stage."""
    # Megatron's own layer needs Apex to add to the buffer; the kernels may come without it.
    apex = config.megatron.transformer.get("gradient_accumulation_fusion", False)
    loss = _norm_bytes(z) + z.N * z.H * z.b + 4 * z.A * z.V + 9 * z.A
    # The profile has both passes together.
    launches = config.hardware.microbatch_overhead_us * 1e-6
    return [
        _product(config, z, "head", 2 * z.A * z.H * z.V, config.hardware.gemm_efficiency,
                 z.H * z.V, "2 A H V", peak=_half_peak(config), fused=z.fused and bool(apex)),
        _moved(config, "loss", 2 * loss),
        _launches(launches / 3, 2 * launches / 3),
    ]  # fmt: skip


def mtp_parts(config: Config, z: Shapes) -> list[Part]:
    """Projections of multi-token prediction from two hidden states to one (DeepSeek-V3,
    arXiv:2412.19437, section 2.2).
    """
    count, weights = config.model.mtp_layers, 2 * z.H * z.H / z.t
    if not count:
        return []
    one = _product(config, z, "joined", count * 2 * z.A * weights,
                   config.hardware.gemm_efficiency, count * weights, "4 A H H / t")  # fmt: skip
    return [one]


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
