"""Kernels that a layer launches, and the host's time for them.

A device waits where its kernels are shorter than the host's work to launch them, so a pass takes
the longer of the two. CUDA graphs launch a captured part as one.

Counts are those of Megatron-Core 0.19 with TransformerEngine. A profile of Qwen3-30B-A3B on 16 H100
in the documentation of Megatron Bridge (moe-comm-overlap) has 463,348 kernels in 64 micro-batches
of 48 layers: 151 a layer, both passes, with 8 experts on a rank, of which grouped products, one
kernel an expert, are 6 x 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_train.config.root import Config
from moe_train.features.dispatchers import dispatcher
from moe_train.parallel.shapes import Shapes
from moe_train.planner.cost.constants import constants


class Launches(NamedTuple):
    """Kernels of a forward and of a backward pass."""

    forward: int
    backward: int


ATTENTION = Launches(12, 22)
"""Norm, products, rotation, attention, residual; with gradients of inputs and weights."""
ROUTER = Launches(14, 20)
"""Norm, logits, top-k, auxiliary loss, counts and indices for the exchange."""
LATENT = Launches(8, 14)
"""More for multi-latent attention: down-projections, their norms, and the heads' concatenation."""
SHARED = Launches(3, 6)
RING = Launches(3, 6)
"""More for attention over parts of a sequence: K and V joined, the first log-sum copied and output
scaled; backward K and V copied, a message (a send and a receive), the first dQ, dK and dV."""
RING_STEP = Launches(5, 8)
"""Of each further step: a send and a receive, attention, correction of log-sum and output; backward
attention's 3 kernels and 3 additions: counted in TransformerEngine's context_parallel.py."""
GRADIENTS = 9
"""Additions to gradient buffers of a layer's weights where products do not fuse them."""
CAST = 1
"""Kernels more for each fp8 product, the cast of its input or of its output's gradient; of grouped
products for each expert."""
CHUNK = Launches(20, 20)
"""Of the schedule around the layers of a model chunk: messages, their buffers, the loss's pieces:
assumed."""
GROUPED = 0.5
"""Host time of one expert's product over another kernel's: TransformerEngine launches them from a
loop in C++; assumed, with what autograd and the gradient hooks do for each expert's weights."""
UNFUSED = 2.0
"""Kernels of torch's own operators for one of TransformerEngine: assumed, from norms, rotation,
SwiGLU and router, which have 3 to 6 for one."""

GRAPHED = {"attn": ("attention",), "moe_router": ("router",), "moe_preprocess": ("router",)}
"""Megatron's cuda_graph_scope and the part that it captures."""
WHOLE = "full_iteration"


def graphs(transformer: Mapping[str, Any]) -> frozenset[str]:
    """Parts of a layer that run as CUDA graphs, by ``megatron.transformer``'s fields."""
    kind = transformer.get("cuda_graph_impl", "none")
    scope = transformer.get("cuda_graph_scope") or []
    scopes = [scope] if isinstance(scope, str) else list(scope)
    if kind == WHOLE or (kind != "none" and WHOLE in scopes):
        return frozenset(("attention", "router", "exchange", "experts"))
    if kind == "none":
        return frozenset()
    return frozenset(part for one in scopes for part in GRAPHED.get(one, ()))


def layer_launches(config: Config, z: Shapes, layers: int = 1) -> dict[str, tuple[float, float]]:
    """Kernels by part of one layer: attention, router, exchange, experts.

    Args:
        layers: layers whose experts a rank runs, above 1 under ``placement=span``; 0 for a layer
            that has none.
    """
    shared = SHARED if z.W else Launches(0, 0)
    latent = LATENT if z.C else Launches(0, 0)
    ring = [(z.c > 1) * once + (z.c - 1) * each for once, each in zip(RING, RING_STEP, strict=True)]
    casts = CAST if config.dtype == "fp8" else 0
    one: dict[str, tuple[float, float]] = {
        "attention": (
            ATTENTION.forward + latent.forward + ring[0] + 2 * casts,
            ATTENTION.backward + latent.backward + ring[1] + 2 * casts,
        ),
        "router": (ROUTER.forward + shared.forward, ROUTER.backward + shared.backward),
        "exchange": dispatcher(config.parallel.dispatcher, span=z.span).launches,
    }
    if not z.fused:
        one = {name: (UNFUSED * a, UNFUSED * b) for name, (a, b) in one.items()}
    if not layers:
        return {"attention": one["attention"], "router": (SHARED.forward, SHARED.backward)}
    modules = layers * z.local_experts
    # torch's grouped product is one kernel for all experts, TransformerEngine's one for each.
    each = modules if z.fused else layers
    one["experts"] = ((2 + casts) * GROUPED * each, (4 + casts) * GROUPED * each)
    captured = graphs(config.megatron.transformer)
    return {name: (1.0, 1.0) if name in captured else count for name, count in one.items()}


def host_seconds(
    config: Config, z: Shapes, layers: int = 1, in_chunk: int = 1
) -> tuple[float, float]:
    """Seconds in which the host launches one layer, forward and backward; 0 on a CPU.

    Args:
        in_chunk: layers of a model chunk, which share what the schedule launches.
    """
    each = config.hardware.launch_us * 1e-6 * constants(config.hardware).host
    if not each:
        return 0.0, 0.0
    counts = layer_launches(config, z, layers).values()
    ahead, back = (
        sum(one[i] for one in counts) + around / in_chunk for i, around in enumerate(CHUNK)
    )
    return each * ahead, each * back
