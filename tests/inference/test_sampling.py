"""The choice of a token, against Transformers' own filters."""

from __future__ import annotations

import pytest
import torch

from moe_train.errors import ConfigError
from moe_train.inference.request import Sampling
from moe_train.inference.sampling import choose, filtered

LOGITS_BV = torch.randn(16, 50, generator=torch.Generator().manual_seed(3)) * 3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 200])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 0.95, 1.0])
def test_filters_are_those_of_transformers(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    transformers = pytest.importorskip("transformers")
    process = [transformers.TemperatureLogitsWarper(temperature)]
    if top_k is not None:
        process.append(transformers.TopKLogitsWarper(top_k))
    if top_p is not None:
        process.append(transformers.TopPLogitsWarper(top_p))
    expected = LOGITS_BV.double()
    for one in process:
        expected = one(torch.zeros(16, 1, dtype=torch.long), expected)
    ours = filtered(LOGITS_BV, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(ours, expected)


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=0.7, top_k=5)
    row_1V = LOGITS_BV[:1]
    count = 4000
    drawn = choose(row_1V.expand(count, -1), sampling, [(0, place) for place in range(count)])
    expected = filtered(row_1V, sampling).softmax(dim=1)[0]
    seen = torch.bincount(drawn, minlength=50) / count
    assert (seen[expected == 0] == 0).all()
    # Four standard deviations of a share of 4000 draws.
    assert ((seen - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()


def test_a_draw_depends_on_seed_prompt_and_position_alone() -> None:
    places = [(prompt, position) for prompt in range(4) for position in range(4)]
    tokens = choose(LOGITS_BV[:1].expand(16, -1), Sampling(), places)
    assert tokens.unique().numel() > 2
    backwards = choose(LOGITS_BV[:1].expand(16, -1), Sampling(), places[::-1])
    assert torch.equal(tokens, backwards.flip(0))
    other = choose(LOGITS_BV[:1].expand(16, -1), Sampling(seed=5), places)
    assert not torch.equal(tokens, other)


def test_greedy_is_the_largest() -> None:
    tokens = choose(LOGITS_BV, Sampling(greedy=True), [(0, 0)] * 16)
    assert torch.equal(tokens, LOGITS_BV.argmax(dim=1))
    cold = choose(LOGITS_BV, Sampling(temperature=1e-4), [(1, 2)] * 16)
    assert torch.equal(tokens, cold)


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (Sampling(temperature=0.0), "temperature"),
        (Sampling(temperature=float("inf")), "temperature"),
        (Sampling(temperature=float("nan")), "temperature"),
        (Sampling(top_k=0), "top_k"),
        (Sampling(top_p=0.0), "top_p"),
        (Sampling(top_p=1.5), "top_p"),
    ],
)
def test_meaningless_values_are_refused(sampling: Sampling, field: str) -> None:
    [fault] = sampling.faults()
    assert isinstance(fault, ConfigError) and fault.field == field
