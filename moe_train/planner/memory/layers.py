"""Memory of one layer under a recomputation policy: what it saves, what its backward pass adds."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

from moe_train.parallel.shapes import Shapes
from moe_train.planner.memory.activations import (
    MEGATRON,
    TORCH,
    Term,
    dense_terms,
    expert_terms,
    layer_input,
    routing_terms,
    span_terms,
)

SELECTIVE = {
    # moe_train: config's module -> names of the terms that are then recomputed.
    "core_attn": ("attention output", "attention log-sum"),
    "layernorm": ("QKV input", "router and expert input"),
    "moe_act": ("fc2 input",),
    "mla_up_proj": ("QKV", "values", "rotated Q and K"),
    "shared_experts": (
        "shared expert fc1 input in fp8", "shared expert fc1 output", "shared expert fc2 input",
    ),
    "moe": (
        "router scores", "permutation map", "permutation", "combined rows", "expert input",
        "fc1 output", "fc2 input", "row probabilities",
    ),
}  # fmt: skip
"""What Megatron's selective recomputation drops, by ``recompute.modules``."""


class Phase(NamedTuple):
    """A part of a pass, and the buffers that are alive in it beside what is saved."""

    name: str
    terms: tuple[Term, ...]


HOSTING = "model/span/experts, torch's kernels"
INPUT_TWICE = "layer input, counted already"
"""Name of the negative term for what a recomputed layer saves in any case."""


def whole_layer(z: Shapes) -> list[Term]:
    """All that a layer without recomputation saves on the rank of its tokens."""
    return list(_whole_layer(z))


@lru_cache(maxsize=256)
def _whole_layer(z: Shapes) -> tuple[Term, ...]:
    """Asked for every layer and moment of the thousands of plans that a search compares."""
    local = (*dense_terms(z), *routing_terms(z))
    return local if z.span else (*local, *expert_terms(z))


def saved_terms(
    z: Shapes, *, recomputed: bool, modules: Collection[str] = (), combined: bool = False
) -> list[Term]:
    """Saved by a layer for one micro-batch between its forward and backward pass.

    Args:
        combined: it runs in combined 1F1B, whose nodes hold what they were given: the residual
            stream before attention and before the experts. TransformerEngine's norms save both
            as well; torch's own save fp32 copies.
    """
    if recomputed:
        return [layer_input(z)]
    dropped = {name for module in modules for name in SELECTIVE.get(module, ())}
    if "moe" in modules and z.span:
        dropped -= {"router scores", "permutation map", "permutation", "combined rows"}
    saved = [term for term in whole_layer(z) if term.name not in dropped]
    if combined and not z.fused:
        size, source = 2 * z.N * z.H * z.b, MEGATRON + " (ScheduleNode.inputs)"
        saved.append(Term("residual stream, held by combined 1F1B", size, "2 N H b", source))
    return saved


def begun_terms(z: Shapes, modules: Collection[str] = ()) -> list[Term]:
    """Of a layer that runs forward beside another's backward pass, when the latter's experts run.

    In combined 1F1B (``parallel.overlap_expert_comm``) attention, router and permutation of the
    next micro-batch's layer precede the backward pass of the experts, and its experts follow
    (Megatron-Core 0.19, ``TransformerLayerSchedulePlan.run``).
    """
    experts = {term.name for term in expert_terms(z)}
    saved = saved_terms(z, recomputed=False, modules=modules, combined=True)
    sent = Term("rows to dispatch", z.N * z.K * z.H * z.b, "N K H b", MEGATRON)
    return [*(term for term in saved if term.name not in experts), sent]


def owner_terms(z: Shapes, modules: Collection[str] = ()) -> list[Term]:
    """Saved by an expert's owner rank for one micro-batch and layer under ``placement=span``.

    Full recomputation of layers does not reach it: the exchange is not repeated.
    """
    again, act = "moe" in modules, "moe_act" in modules
    if z.fused:
        received = span_terms(z)
        return received[:1] if again else [*received, *expert_terms(z, act=act)]
    # The activation is never saved (backend/torch_kernels/replay.py).
    inputs, first, scores = expert_terms(z, act=True)
    return [inputs, scores] if again else [inputs, first, scores]


def recomputed_terms(z: Shapes, *, recomputed: bool, modules: Collection[str] = ()) -> list[Term]:
    """Recomputed while one layer's backward pass runs."""
    saved = saved_terms(z, recomputed=recomputed, modules=modules)
    names = {term.name for term in saved}
    again = [term for term in whole_layer(z) if term.name not in names]
    if recomputed and (z.fused or z.b == 4):
        # The first norm saves its input as it is; in 16 bits torch's own saves fp32 copies.
        again.append(Term(INPUT_TWICE, -layer_input(z).bytes, "- N H b", MEGATRON))
    if recomputed:
        again.append(Term("layer output, recomputed", layer_input(z).bytes, "N H b", MEGATRON))
    return again


def attention_backward(z: Shapes) -> list[Term]:
    """Gradients alive in attention's backward pass, which combined 1F1B runs last.

    Elsewhere the experts' backward pass of the same layer needs more; here a whole layer of the
    next micro-batch has been saved by then.
    """
    wide = z.A * (z.Q + 2 * z.G) * z.b
    norms = [] if z.fused else [Term("gradients of the norms", 8 * z.N * z.H, "8 N H", TORCH)]
    return [
        Term("gradient of the residual stream", z.N * z.H * z.b, "N H b", MEGATRON),
        Term("gradient of attention output", z.A * z.U * z.b, "A U b", MEGATRON),
        Term("gradients of Q, K and V", wide, "A (Q + 2 G) b", MEGATRON),
        Term("gradient of QKV", wide, "A (Q + 2 G) b", MEGATRON),
        *norms,
    ]


def forward_buffers(z: Shapes) -> list[Term]:
    """Buffers of the exchange in a forward pass.

    A dispatcher sends rows sorted by expert, receives them by source, and sorts them once more.
    Torch's kernels under ``placement=span`` split what they save by stage.
    """
    if not z.span or z.fused:
        sent, received = z.N * z.K * z.H * z.b, z.R * z.H * z.b
        return [
            Term("all-to-all send buffer", sent, "N K H b", MEGATRON + " token dispatcher"),
            Term("all-to-all receive buffer", received, "R H b", MEGATRON + " token dispatcher"),
        ]
    return [
        Term("packed rows sent", z.N * z.K * z.packed_row, "N K w", "model/span/packing"),
        Term("packed rows received", z.R * z.packed_row, "R w", "model/span/packing"),
        Term("expert input of all stages", z.R * z.H * z.b, "R H b", HOSTING),
        Term("fc1 output of all stages", 2 * z.R * z.F * z.b, "2 R F b", HOSTING),
        Term("expert results", z.R * z.H * z.b, "R H b", HOSTING),
    ]


def layer_backward(z: Shapes, saved: Collection[str]) -> list[Phase]:
    """The phases of one layer's backward pass in which most is alive, beside what it saved.

    Args:
        saved: names of what the layer saved (recomputed terms included), which its operations free.

    Saved tensors are gone once their operation went backward: at the first matrix neither the
    combined rows nor the second matrix's input exist any more.
    """
    if z.fused:
        gradients = (
            Term("gradient of combined rows", z.N * z.K * z.H * z.b, "N K H b", MEGATRON),
            Term("gradient of expert output", z.R * z.H * z.b, "R H b", MEGATRON),
            Term("gradient of fc1 output", 2 * z.R * z.F * z.b, "2 R F b", MEGATRON),
            Term("gradient of expert input", z.R * z.H * z.b, "R H b", MEGATRON),
        )
        return [Phase("", gradients)]
    if z.span:
        return _span_backward(z, saved)
    around = [Term("gradient of expert output", z.R * z.H * z.b, "R H b", MEGATRON)]
    return _matrices_back(z, saved, around)


def _span_backward(z: Shapes, saved: Collection[str]) -> list[Phase]:
    """The same under ``placement=span``, where the rows of all stages go backward together.

    The experts' forward pass is replayed: the activation comes back, and what the first matrix
    produced is concatenated from the stages' parts, or recomputed with the experts.
    """
    rows = z.R * z.H * z.b
    around = [
        # The exchange holds what went out and what came until the experts are done.
        Term("gradient of combined rows", z.N * z.K * z.H * z.b, "N K H b", "model/span"),
        Term("gradient of expert output", rows, "R H b", "model/span"),
        *([Term("the same by expert", rows, "R H b", HOSTING)] if z.t > 1 else []),
    ]
    again = [Term("fc2 input, recomputed", z.R * z.F * z.b, "R F b", HOSTING)]
    if "fc1 output" not in saved:
        around.append(Term("expert input of all stages", rows, "R H b", HOSTING))
        again.append(Term("fc1 output, recomputed", 2 * z.R * z.F * z.b, "2 R F b", HOSTING))
    product, activation, first = _matrices_back(z, saved, around)
    gone = {"fc2 input, recomputed"}
    return [
        Phase(product.name, (*product.terms, *again)),
        Phase(activation.name, (*activation.terms, *(t for t in again if t.name not in gone))),
        first,
        _gradients_back(z, saved),
    ]


def _matrices_back(z: Shapes, saved: Collection[str], around: list[Term]) -> list[Phase]:
    freed = {
        "combined rows": z.N * z.K * z.H * z.b,
        "fc2 input": z.R * z.F * z.b,
        "fc1 output": 2 * z.R * z.F * z.b,
    }

    def gone(*names: str) -> list[Term]:
        return [
            Term(f"{name}, freed", -freed[name], "", MEGATRON) for name in names if name in saved
        ]

    weight = z.local_experts * z.F * z.H * z.b
    # torch computes a weight's gradient whole before it is added to the gradient buffer;
    # fused accumulation adds products into the buffer itself.
    return [
        Phase(
            ", second matrix",
            (
                *gone("combined rows"),
                *around,
                Term("gradient of fc2 input", z.R * z.F * z.b, "R F b", MEGATRON),
                Term("fc2 weight gradient", weight, "E/e F H b", TORCH),
            ),
        ),
        Phase(
            ", SwiGLU",
            (
                *gone("combined rows", "fc2 input"),
                *around,
                Term("gradient of fc2 input", z.R * z.F * z.b, "R F b", MEGATRON),
                Term("SwiGLU gradient in fp32", 12 * z.R * z.F, "12 R F", TORCH),
            ),
        ),
        Phase(
            ", first matrix",
            (
                *gone("combined rows", "fc2 input", "fc1 output"),
                *around,
                Term("gradient of fc1 output", 2 * z.R * z.F * z.b, "2 R F b", MEGATRON),
                Term("gradient of expert input", z.R * z.H * z.b, "R H b", MEGATRON),
                Term("fc1 weight gradient", 2 * weight, "2 E/e F H b", TORCH),
            ),
        ),
    ]


def _gradients_back(z: Shapes, saved: Collection[str]) -> Phase:
    """The end of the spanning exchange: every buffer of its backward pass at once."""
    sent, received = z.N * z.K, z.R
    freed = [Term("combined rows, freed", -sent * z.H * z.b, "", MEGATRON)] if (
        "combined rows" in saved) else []  # fmt: skip
    if "fc1 output" in saved:
        freed.append(Term("fc1 output, freed", -2 * z.R * z.F * z.b, "", HOSTING))
    return Phase(
        ", gradients back",
        (
            *freed,
            Term("gradient of expert output", received * z.H * z.b, "R H b", "model/span"),
            Term("gradient of combined rows", sent * z.H * z.b, "N K H b", "model/span"),
            Term("packed gradients", received * z.packed_row, "R w", "model/span/packing"),
            Term("packed, returned", sent * z.packed_row, "N K w", "model/span/packing"),
            Term("unpacked", sent * z.H * z.b, "N K H b", "model/span/packing"),
        ),
    )


def retained_terms(z: Shapes, recomputed: int) -> list[Term]:
    """Held by the layers whose backward pass has run.

    Megatron's token dispatcher holds its last routing probabilities as an attribute. In a
    recomputed layer they hang on the graph of its recomputation, and with it the layer's input
    and that input's gradient stay until the dispatcher's next use. The spanning layer has no
    dispatcher.

    Args:
        recomputed: recomputed layers of this chunk that have gone backward.
    """
    size = recomputed * z.N * z.H * z.b
    source = MEGATRON + " (MoEAlltoAllTokenDispatcher.probs)"
    return [
        Term("inputs of recomputed layers, not yet freed", size, "N H b each", source),
        Term("gradients of these inputs", size, "N H b each", source),
    ]


def persistent_buffers(z: Shapes) -> list[Term]:
    """Buffers that are never freed: Megatron's for inputs gathered over TP."""
    if z.t == 1 or z.fused:
        return []
    source = "Megatron-Core's GlobalMemoryBuffer"
    return [Term("gathered input", z.A * z.H * z.b, "A H b", source)]


def loss_phases(z: Shapes) -> list[Phase]:
    """Loss and head, beside what they save (see ``activations.head_terms``).

    The loss turns logits into fp32 probabilities in place of an fp32 copy, and those into the
    gradient, which is cast to the compute dtype. The head goes backward when they are gone.
    """
    logits = z.A * z.V * z.b
    # In 16 bits; their gradient takes as much when they are gone.
    copies = [Term("logits", logits, "A V b", MEGATRON)] if z.b < 4 else []
    if z.fused:
        return [Phase("loss", tuple(copies))]
    head = (
        Term("softmax of the loss, freed", -4 * z.A * z.V, "4 A V", MEGATRON),
        Term("gradient of logits", logits, "A V b", MEGATRON),
        Term("gradient of head input", z.A * z.H * z.b, "A H b", MEGATRON),
        Term("head weight gradient", z.V * z.H * z.b, "V H b", TORCH),
    )
    return [Phase("loss", tuple(copies)), Phase("backward of the head", head)]
