"""How many micro-batches' activations a stage holds at once.

1F1B          P - s                       Narayanan et al., arXiv:2104.04473, section 2.2
interleaved   2 (P - s - 1) + (v - 1) P + 1 chunks of L / (P v) layers, the same paper
spanning      2 (P - 1 - s) + 1           `moe_train.parallel.ticks`; one more where overlapped
experts under span: the sum over source stages, P^2, spread over P ranks: P on each
"""

from __future__ import annotations

from moe_train.parallel.layout import Layout
from moe_train.parallel.ticks import in_flight as span_in_flight


def chunks_in_flight(layout: Layout, stage: int, microbatches: int, delay: int = 0) -> int:
    """Most model chunks (whole stages without interleaving) kept by `stage` (0-based).

    Args:
        delay: ticks by which spanning's backward passes come later, to be overlapped.
    """
    stages, chunks = layout.pipeline, layout.virtual_pipeline
    if layout.span:
        return span_in_flight(stages, stage, microbatches, delay)
    if stages == 1:
        return 1
    if chunks > 1:
        return min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, microbatches * chunks)
    return min(stages - stage, microbatches)


def span_rows_in_flight(stages: int, microbatches: int, delay: int = 0) -> float:
    """Micro-batches of routed rows kept per local layer by every hosting rank.

    A rank receives 1 / P of a stage's rows, from each of the P stages.
    """
    kept = sum(span_in_flight(stages, stage, microbatches, delay) for stage in range(stages))
    return kept / stages
