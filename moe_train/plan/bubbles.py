"""The share of a pipelined step in which a stage waits, for uniform stages."""

from __future__ import annotations


def bubble(stages: int, microbatches: int, chunks: int = 1) -> float:
    """(P - 1) / (v M + P - 1): 1F1B and GPipe with v = 1, interleaved 1F1B with v > 1.

    Source: Narayanan et al., arXiv:2104.04473, section 2.2, whose bubble time over ideal time
    (P - 1) / (v M) is here taken over the whole step.
    """
    return (stages - 1) / (chunks * microbatches + stages - 1)


def span_dense_bubble(stages: int, microbatches: int) -> float:
    """Tick-aligned 1F1B: M + P - 1 forward and backward halves, of which a stage uses M each.

    The experts' bubble is 0: every rank serves whichever stages are active.
    """
    return bubble(stages, microbatches)
