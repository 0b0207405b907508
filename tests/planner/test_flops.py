"""FLOPs per token against a count over explicit matrix shapes, and known figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.config.model import ModelConfig
from moe_train.parallel.flops import flops_per_token, mfu


def counted(model: ModelConfig, sequence: int, vocab: int) -> float:
    """One sequence, product by product, as (rows, inner, columns); three passes; per token."""
    width = model.head_dim or model.hidden // model.heads
    kv = (model.kv_heads or model.heads) * width
    q = model.heads * width
    layer = [
        (sequence, model.hidden, q),
        (sequence, model.hidden, kv),
        (sequence, model.hidden, kv),
    ]
    layer += [(sequence, q, model.hidden), (sequence, model.hidden, model.experts)]
    for position in range(sequence):
        layer += [(1, width, position + 1), (1, position + 1, width)] * model.heads
    inner = [model.expert_hidden] * model.experts_per_token + [model.shared_expert_hidden]
    for hidden in inner:
        layer += [(sequence, model.hidden, hidden)] * 2 + [(sequence, hidden, model.hidden)]
    products = layer * model.layers + [(sequence, model.hidden, vocab)]
    return 3 * sum(2 * m * k * n for m, k, n in products) / sequence


@given(
    heads=st.sampled_from([1, 2, 4]),
    grouped=st.booleans(),
    head_dim=st.sampled_from([None, 3, 16]),
    experts=st.integers(1, 9),
    shared=st.sampled_from([0, 5]),
    sequence=st.integers(1, 9),
    layers=st.integers(1, 3),
)
def test_equals_the_count_over_matrix_shapes(
    heads: int,
    grouped: bool,
    head_dim: int | None,
    experts: int,
    shared: int,
    sequence: int,
    layers: int,
) -> None:
    model = ModelConfig(
        layers=layers,
        hidden=8,
        heads=heads,
        kv_heads=1 if grouped else None,
        head_dim=head_dim,
        experts=experts,
        experts_per_token=min(2, experts),
        expert_hidden=7,
        shared_expert_hidden=shared,
    )
    assert flops_per_token(model, sequence, 11).total == pytest.approx(counted(model, sequence, 11))


def test_the_30b_costs_six_flops_an_active_weight() -> None:
    model = ModelConfig(hidden=4608, head_dim=128, expert_hidden=2048)
    flops = flops_per_token(model, 4096, 50304)
    # Active weights that multiply: 2 of 64 experts, attention, routers and the output head.
    active = 28.991e9 * 2 / 64 + 0.604e9 + 0.0047e9 + 0.232e9
    assert flops.total - flops.scores == pytest.approx(6 * active, rel=1e-3)
    # 8 x 312 TFLOP/s at 60 % is about 125k tokens/s when scores are left out (sequence -> 0).
    short = flops.total - flops.scores
    assert mfu(143_000, short, 8 * 312e12) == pytest.approx(0.6, abs=0.02)


def test_mfu_is_linear_and_absent_without_a_peak() -> None:
    assert mfu(100.0, 5e9, 1e12) == pytest.approx(0.5)
    assert mfu(100.0, 5e9, 0.0) is None
