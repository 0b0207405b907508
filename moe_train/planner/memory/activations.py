"""Activations of one micro-batch that a layer, the embedding and the head save for backward.

Each tensor that autograd saves is one `Term`, as in Korthikanti et al. (arXiv:2205.05198), for
this project's layer: RMSNorm, rotary attention in one fused kernel (no scores are saved), top-k
router in fp32, grouped SwiGLU experts with the routing probability fused in. A tensor that two
operations save is counted where it is saved first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_train.parallel.shapes import Shapes

KORTHIKANTI = "Korthikanti et al., arXiv:2205.05198, section 4"
MEGATRON = "what Megatron-Core 0.19 saves for backward"
TORCH = "what torch's own kernels save for backward"
ENGINE = "what TransformerEngine saves for backward"
QUANTIZED = ENGINE + ": the columns of its Linear's and GroupedLinear's input in fp8"


@dataclass(frozen=True)
class Term:
    """One summand of a memory estimate, in bytes."""

    name: str
    bytes: float
    formula: str
    """In the letters of `moe_train.parallel.shapes`."""
    source: str


def total(terms: Iterable[Term]) -> float:
    """Sum of the terms' bytes."""
    return sum(term.bytes for term in terms)


def dense_terms(z: Shapes) -> list[Term]:
    """Attention, norms and router of one layer; on the rank of the tokens."""
    gathered = "all-gathered again in the backward pass; " + KORTHIKANTI
    return [
        *_norm("attention norm", z),
        Term("QKV input", z.N * z.H * z.s, "N H s", gathered),
        _values(z),
        *_qk_norm(z),
        Term("rotated Q and K", z.A * (z.Q + z.G) * z.b, "A (Q + G) b", MEGATRON),
        Term("rotary tables", 4 * z.T * z.D * z.b, "4 T D b", MEGATRON),
        *_latents(z),
        Term("attention output", z.A * z.U * z.b, "A U b", KORTHIKANTI),
        *_copy("projection input in fp8", z, z.A * z.U, "A U s"),
        Term("attention log-sum", z.A * z.n * 4, "4 A n", "FlashAttention, arXiv:2205.14135"),
        *_norm("MoE norm", z),
        Term("router and expert input", z.N * z.H * z.b, "N H b", MEGATRON),
        Term("router scores", z.N * (4 * z.E + 20 * z.K + 8), "N (4 E + 20 K + 8)", MEGATRON),
        *_shared(z),
    ]


def _values(z: Shapes) -> Term:
    """Keys are rotated into a tensor of their own, values stay parts of the product QKV.

    TransformerEngine's attention takes both in one layout, so it copies the values.
    """
    if z.fused:
        return Term("values", z.A * z.G * z.b, "A G b", ENGINE + " (get_qkv_layout)")
    return Term("QKV", z.A * (z.Q + 2 * z.G) * z.b, "A (Q + 2 G) b", MEGATRON)


def _copy(name: str, z: Shapes, elements: int, formula: str) -> list[Term]:
    """What a matrix product in fp8 saves beside an input that another operation keeps."""
    if z.s == z.b:
        return []
    return [Term(name, elements * z.s, formula, QUANTIZED)]


def _norm(name: str, z: Shapes) -> list[Term]:
    if z.fused:
        return [Term(name, z.N * (z.H * z.b + 4), "N (H b + 4)", KORTHIKANTI)]
    return [Term(name, z.N * (8 * z.H + 4), "N (8 H + 4)", TORCH + ": two fp32 copies")]


def _qk_norm(z: Shapes) -> list[Term]:
    """Queries are copied out of QKV where they are normalised; torch's keys are a view of it.

    TransformerEngine's norm copies the keys as well.
    """
    if z.qk_norm == "none":
        return []
    if z.qk_norm == "full":
        size, formula = z.A * (z.Q * z.b + 8), "A (Q b + 8)"
        return [Term("QK norm", size, formula, "model/qk_norm: input and scale")]
    scales = 4 * z.A * (z.n + z.G // z.D)
    if z.fused:
        size, formula = z.A * (z.Q + z.G) * z.b + scales, "A ((Q + G) b + 4 n + 4 G / D)"
        return [Term("QK norm", size, formula, ENGINE + " (RMSNorm)")]
    # In fp32 the first copy of the keys would be the view of QKV itself.
    key, formula = (4, "4 G") if z.b == 4 else (8, "8 G")
    size = z.A * (8 * z.Q + key * z.G) + scales
    formula = f"A (8 Q + {formula} + 4 n + 4 G / D)"
    return [Term("QK norm", size, formula, TORCH + ": two fp32 copies")]


def _latents(z: Shapes) -> list[Term]:
    if not z.C:
        return []
    # The down-projections' results, and the latents behind their norms, gathered over TP.
    return [Term("latents", (z.N + z.A) * z.C * z.b, "(N + A) C b", MEGATRON)]


def _shared(z: Shapes) -> list[Term]:
    if not z.W:
        return []
    return [
        *_copy("shared expert fc1 input in fp8", z, z.N * z.H, "N H s"),
        Term("shared expert fc1 output", 2 * z.A * z.W * z.b, "2 A W b", KORTHIKANTI),
        Term("shared expert fc2 input", z.A * z.W * z.s, "A W s", KORTHIKANTI),
    ]


def routing_terms(z: Shapes) -> list[Term]:
    """Saved by the permutation of tokens, on the rank of the tokens."""
    if z.fused:
        size = 4 * z.N * (2 * z.E + 1)
        return [Term("permutation map", size, "4 N (2 E + 1)", "TransformerEngine's row_id_map")]
    return [
        Term("permutation", 8 * z.N * (z.E + z.K), "8 N (E + K)", TORCH),
        Term("combined rows", z.N * z.K * z.H * z.b, "N K H b", TORCH + " (index_add)"),
    ]


def expert_terms(z: Shapes, rows: float | None = None, *, act: bool = False) -> list[Term]:
    """Saved by the experts, on the rank that owns them.

    Args:
        rows: routed rows received; None is R.
        act: the SwiGLU product is recomputed (``recompute.modules=[moe_act]``).
    """
    r = z.R if rows is None else rows
    product = Term("fc2 input", r * z.F * z.s, "R F s", KORTHIKANTI)
    return [
        Term("expert input", r * z.H * z.s, "R H s", MEGATRON),
        Term("fc1 output", 2 * r * z.F * z.b, "2 R F b", MEGATRON + " (fused SwiGLU: its input)"),
        *([] if act else [product]),
        Term("row probabilities", 4 * r, "4 R", MEGATRON),
    ]


def span_terms(z: Shapes) -> list[Term]:
    """Saved by the spanning exchange on the owner rank beside the experts' own terms, with
    TransformerEngine's kernels.
    """
    packed = z.R * z.packed_row
    return [
        Term("received rows", packed if z.t > 1 else 4 * z.R, "R w", "model/span/experts"),
        Term("expert results", z.R * z.H * z.b, "R H b", "model/span/experts"),
    ]


def layer_input(z: Shapes) -> Term:
    """All that a recomputed layer saves."""
    return Term("layer input", z.N * z.H * z.b, "N H b", KORTHIKANTI + " (full recomputation)")


def embedding_terms(z: Shapes) -> list[Term]:
    """First stage: token ids and, with TP, the mask of foreign ones."""
    return [Term("token ids", z.A * (8 + (z.t > 1)), "A (8 + [t > 1])", MEGATRON)]


def head_terms(z: Shapes) -> list[Term]:
    """Last stage: final norm, head input, and what the loss keeps in fp32 of each logit.

    Megatron's losses keep probabilities; TransformerEngine's (``cross_entropy_fusion_impl=te``)
    keeps their gradient, from its release 2.18 on in fp32 as well.
    """
    return [
        *_norm("final norm", z),
        Term("head input", z.N * z.H * z.b, "N H b", KORTHIKANTI),
        Term("softmax of the loss", z.A * z.V * 4, "4 A V", MEGATRON + " (cross-entropy in fp32)"),
        Term("loss targets", z.A * 9, "9 A", MEGATRON),
    ]
