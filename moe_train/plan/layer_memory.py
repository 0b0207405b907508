"""One layer under a recomputation policy: what it keeps, what its backward pass adds."""

from __future__ import annotations

from collections.abc import Collection

from moe_train.plan.activations import (
    dense_terms,
    expert_terms,
    layer_input,
    routing_terms,
    span_terms,
)
from moe_train.plan.shapes import Shapes
from moe_train.plan.terms import HOST, MEGATRON, Term

SELECTIVE = {
    # moe_train: config's module -> names of the terms that are then recomputed.
    "core_attn": ("attention output", "attention log-sum"),
    "layernorm": ("QKV input", "router and expert input"),
    "moe_act": ("fc2 input",),
    "shared_experts": ("shared expert fc1 output", "shared expert fc2 input"),
    "moe": (
        "router scores", "permutation map", "permutation", "combined rows", "expert input",
        "fc1 output", "fc2 input", "row probabilities",
    ),
}  # fmt: skip
"""What Megatron's selective recomputation drops, by ``recompute.modules``."""


INPUT_TWICE = "layer input, counted already"
"""Name of the term that takes back what a recomputed layer keeps in any case."""


def whole_layer(z: Shapes, *, span: bool) -> list[Term]:
    """All that an unrecomputed layer keeps on the rank of its tokens."""
    local = [*dense_terms(z), *routing_terms(z)]
    return local if span else [*local, *expert_terms(z)]


def kept_terms(
    z: Shapes, *, recomputed: bool, modules: Collection[str] = (), span: bool = False
) -> list[Term]:
    """What a layer keeps of one micro-batch between its forward and backward pass."""
    if recomputed:
        return [layer_input(z)]
    dropped = {name for module in modules for name in SELECTIVE.get(module, ())}
    if "moe" in modules and span:
        dropped -= {"router scores", "permutation map", "permutation", "combined rows"}
    return [term for term in whole_layer(z, span=span) if term.name not in dropped]


def hosted_terms(z: Shapes, modules: Collection[str] = ()) -> list[Term]:
    """What a hosting rank keeps of one micro-batch and layer under ``placement=span``.

    Full recomputation of layers does not reach it: the exchange is not repeated.
    """
    if "moe" in modules:
        return [term for term in span_terms(z) if term.name == "received rows"]
    return [*span_terms(z), *expert_terms(z, act="moe_act" in modules)]


def recomputed_terms(
    z: Shapes, *, recomputed: bool, modules: Collection[str] = (), span: bool = False
) -> list[Term]:
    """What comes back while one layer's backward pass runs."""
    kept = kept_terms(z, recomputed=recomputed, modules=modules, span=span)
    names = {term.name for term in kept}
    again = [term for term in whole_layer(z, span=span) if term.name not in names]
    if recomputed and (z.fused or z.b == 4):
        # The first norm saves its input as it is; in 16 bits the host's saves fp32 copies.
        again.append(Term(INPUT_TWICE, -layer_input(z).bytes, "- N H b", MEGATRON))
    return again


def forward_buffers(z: Shapes) -> list[Term]:
    """Dispatch: rows leave sorted by expert and arrive by source, then are sorted once more."""
    sent, received = z.N * z.K * z.H * z.b, z.R * z.H * z.b
    return [
        Term("all-to-all send buffer", sent, "N K H b", MEGATRON + " token dispatcher"),
        Term("all-to-all receive buffer", received, "R H b", MEGATRON + " token dispatcher"),
    ]


def backward_buffers(z: Shapes) -> list[Term]:
    """Gradients alive while the experts of one layer go backward."""
    gradients = [
        Term("gradient of combined rows", z.N * z.K * z.H * z.b, "N K H b", MEGATRON),
        Term("gradient of expert output", z.R * z.H * z.b, "R H b", MEGATRON),
        Term("gradient of fc1 output", 2 * z.R * z.F * z.b, "2 R F b", MEGATRON),
        Term("gradient of expert input", z.R * z.H * z.b, "R H b", MEGATRON),
    ]
    if z.fused:
        return gradients
    weight = z.local_experts * 2 * z.F * z.H * z.b
    # torch computes a weight's gradient whole before it is added to the gradient buffer;
    # fused accumulation adds products into the buffer itself.
    return [
        *gradients,
        Term("fc1 weight gradient", weight, "2 E/e F H b", HOST),
        Term("SwiGLU gradient in fp32", 12 * z.R * z.F, "12 R F", HOST),
    ]


def loss_buffers(z: Shapes) -> list[Term]:
    """Logits in the compute dtype and their gradient, beside the kept fp32 probabilities."""
    logits = z.A * z.V * z.b
    terms = [Term("logits", logits, "A V b", MEGATRON)]
    if z.b < 4:
        terms.append(Term("gradient of logits", logits, "A V b", MEGATRON))
    if not z.fused:
        terms.append(Term("head weight gradient", z.V * z.H * z.b, "V H b", HOST))
    return terms
