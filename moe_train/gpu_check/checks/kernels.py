"""Kernel throughput: attention, grouped products, zero rows; the planner's efficiencies."""

from __future__ import annotations

from moe_train.gpu_check.bench import Bench, check
from moe_train.gpu_check.findings import Findings


@check("kernels", 1, 90, cpu=True)
def kernels(bench: Bench, findings: Findings) -> None:
    """How fast are grouped products by rows, and attention by backend?"""
    bench.do("close")
    findings.note(dense=bench.do("matrix", size=8192 if bench.sizes.gpu else 64))
    experts, hidden, inner = bench.sizes.experts
    rows = bench.do("grouped", experts=experts, hidden=hidden, inner=inner, rows=bench.sizes.rows)
    findings.note(grouped_products=rows)
    findings.require(
        any("backward_tflops" in row for row in rows), "no size of the grouped product ran"
    )
    sequences, heads, tokens, width = bench.sizes.attention
    result = bench.do("attention", sequences=sequences, heads=heads, tokens=tokens, width=width)
    findings.note(attention=result)
    findings.require("backward_tflops" in result[0], f"attention did not run: {result[0]}")


@check("te-zero-rows", 1, 45)
def zero_rows(bench: Bench, findings: Findings) -> None:
    """Do TransformerEngine's experts without tokens get right gradients?"""
    result = bench.te.call("zero_rows", bench.left, hidden=256, inner=512)
    findings.note(**result)
    for name, value in result.items():
        # One bf16 rounding of the result is 2^-8 of its size.
        findings.require(value <= 2e-2, f"{name} is {value:.2e} from the reference")
