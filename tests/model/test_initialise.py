"""Initial weights depend on seed and name alone: bitwise equal in every layout."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest

from moe_train.testing.world import run_world
from tests.support.engines import assemble, open_engine, shards

LAYERS, STD = 4, 0.03
SMALL = (
    *(f"model.layers={LAYERS}", "model.hidden=64", "model.heads=8", "model.kv_heads=4"),
    *("model.experts=8", "model.expert_hidden=48", "model.shared_expert_hidden=32"),
    *(f"model.init_std={STD}", "data.sequence=16", "batch.global=8", "model.vocab=200"),
    *("recompute=none", "parallel=single"),
)
LAYOUTS = {
    "tp2": (2, ("parallel.tensor=2",)),
    "pp2": (2, ("parallel.pipeline=2",)),
    "pp2-virtual2": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "ep2": (2, ("parallel.expert=2",)),
    "tp2-etp2": (2, ("parallel.tensor=2", "parallel.expert_tensor=2")),
    "dp2-distributed": (2, ("optim.distributed=true",)),
    "tp2-pp2-ep2": (4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2")),
}


def _weights(rank: int, world: int, overrides: tuple[str, ...]) -> Any:
    return shards(open_engine(rank, world, overrides, 200))


@cache
def weights(world: int, *overrides: str) -> dict[str, Any]:
    return assemble(run_world(_weights, world, (*SMALL, *overrides)))


@pytest.mark.world
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_from_the_same_bits(layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    single, spread = weights(1), weights(world, *overrides)
    assert single.keys() == spread.keys()
    for key, array in single.items():
        assert np.array_equal(array, spread[key]), key


@pytest.mark.world
def test_tied_embeddings_start_from_the_same_bits() -> None:
    tied = "model.tied_embeddings=true"
    single, spread = weights(1, tied), weights(2, tied, "parallel.pipeline=2")
    assert "output_layer.weight" not in single
    assert single.keys() == spread.keys()
    assert all(np.array_equal(array, spread[key]) for key, array in single.items())


def test_another_seed_is_another_model() -> None:
    first, second = weights(1), weights(1, "run.seed=77")
    for key, array in first.items():
        if "norm" in key:
            assert np.array_equal(array, second[key])
        else:
            assert (array == second[key]).mean() < 0.01, key


def test_no_two_matrices_are_alike() -> None:
    """Layers, experts and the two halves of a gate are drawn on their own."""
    fc1 = weights(1)["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    assert fc1.shape == (LAYERS, 8, 96, 64)
    matrices = fc1.reshape(-1, 48, 64)
    assert len({matrix.tobytes() for matrix in matrices}) == LAYERS * 8 * 2
    flat = matrices.reshape(len(matrices), -1)
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 5.5 / math.sqrt(flat.shape[1])


def test_widths_are_as_designed() -> None:
    """std everywhere, divided by sqrt(2 x layers) where the residual stream is written."""
    for key, array in weights(1).items():
        if "norm" in key:
            assert (array == 1).all(), key
            continue
        writes = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = STD / math.sqrt(2 * LAYERS) if writes else STD
        # Five sigma of a sample's standard deviation and mean.
        assert array.std() == pytest.approx(std, rel=5 / math.sqrt(2 * array.size)), key
        assert abs(array.mean()) < 5 * std / math.sqrt(array.size), key
