"""Counts: the 30B reference config's known figures, and ranks that sum to the model."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from moe_train.config.compose import compose
from moe_train.config.model import ModelConfig
from moe_train.parallel.layout import Layout
from moe_train.parallel.parameters import model_parameters, padded_vocab, rank_parameters


@pytest.fixture(scope="module")
def model_30b() -> ModelConfig:
    return compose(["model=moe_30b", "recompute=none"]).model


def layout(world: int, tp: int, pp: int, ep: int, etp: int = 1, kind: str = "stage") -> Layout:
    return Layout(world, tp, pp, 1, 1, ep, etp, kind, 16, 64)


def test_figures_of_the_30b(model_30b: ModelConfig) -> None:
    counts = model_parameters(model_30b, 50304)
    assert counts.total == 30_063_481_344
    assert counts.experts == 28_991_029_248
    assert round(counts.active / 1e9, 2) == 1.98
    # Counted on the real model, built on fake tensors.
    assert rank_parameters(model_30b, layout(8, 2, 4, 2), 0, 50304).total == 3_816_493_056


@pytest.mark.parametrize(
    ("one", "modules"),
    [
        (layout(8, 2, 4, 2), 128),
        (layout(8, 2, 4, 1, 2), 256),
        (layout(8, 2, 1, 8), 128),
        (layout(32, 2, 4, 8), 32),
        (layout(8, 2, 4, 8, kind="span"), 128),
    ],
)
def test_modules_of_the_five_readings(model_30b: ModelConfig, one: Layout, modules: int) -> None:
    for rank in range(one.world):
        assert rank_parameters(model_30b, one, rank, 50304).expert_modules == modules


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shared", [0, 96])
@pytest.mark.parametrize(
    ("tp", "pp", "ep", "etp"), list(itertools.product((1, 2), (1, 4), (1, 4), (1, 2)))
)
def test_ranks_sum_to_the_model(
    tied: bool, shared: int, tp: int, pp: int, ep: int, etp: int
) -> None:
    model = ModelConfig(
        hidden=64, kv_heads=4, tied_embeddings=tied, shared_expert_hidden=shared, layers=16
    )
    world = pp * 8
    one = layout(world, tp, pp, ep, etp)
    whole = model_parameters(model, 1000)
    ranks = [rank_parameters(model, one, rank, 1000) for rank in range(world)]
    split = sum(r.embedding + r.attention + r.shared_expert for r in ranks)
    assert split == (whole.embedding + whole.attention + whole.shared_expert) * one.data
    assert sum(r.experts for r in ranks) == whole.experts * one.expert_data
    assert sum(r.replicated for r in ranks) == whole.replicated * world // pp
    copies = whole.embedding if tied and pp > 1 else whole.head
    assert sum(r.head for r in ranks) == copies * one.data


def test_counts_equal_a_hand_built_layer() -> None:
    model = ModelConfig(
        layers=1, hidden=8, heads=4, kv_heads=2, head_dim=2, experts=3, expert_hidden=5
    )
    shapes = [(8 + 4 + 4, 8), (8, 8), (8,), (8,), (3, 8), (8,)]
    shapes += [(10, 8), (8, 5)] * 3 + [(128, 8)] * 2
    want = sum(a * (rest[0] if rest else 1) for a, *rest in shapes)
    assert model_parameters(model, 100).total == want
    assert dataclasses.replace(model, tied_embeddings=True) != model
    tied = model_parameters(dataclasses.replace(model, tied_embeddings=True), 100)
    assert tied.total == want - 128 * 8


def test_padding() -> None:
    assert [padded_vocab(n, 128) for n in (1, 128, 129, 50304)] == [128, 128, 256, 50304]
