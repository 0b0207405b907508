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


def span_bubble(
    stages: int, microbatches: int, dense: float, experts: float, exchange: float = 0.0
) -> float:
    """Share of a spanning step in which a stage waits, for uniform stages.

    A step is M + P - 1 halves each way. Each costs `dense` (which idle stages wait for) and
    `exchange` (in which all take part); the experts' seconds, in proportion to the active stages,
    add up to those of M full halves and keep every rank busy.

    Args:
        dense, exchange: seconds of a forward and a backward half together.
        experts: the same with all stages active.
    """
    halves = microbatches + stages - 1
    whole = halves * (dense + exchange) + microbatches * experts
    return (stages - 1) * dense / whole if whole else 0.0
