"""Gradients of Transformers' models are ours, in one process and in layouts that load a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_train.convert.folder import HfFolder, open_folder
from moe_train.testing.world import run_world
from tests.convert.models import BATCH, SEQUENCE, VOCAB, overrides_of
from tests.support.engines import assemble, gradient_shards, micro_batches, open_engine, shards

Array = np.ndarray[Any, Any]
GQA = [(name, "gqa") for name in ("mixtral", "qwen3_moe", "olmoe", "glm4_moe")]
TIED = [(name, "mha-tied") for name, _ in GQA]
LAYOUTS: dict[str, tuple[int, list[str], list[tuple[str, str]]]] = {
    "tp2pp2ep2": (
        4,
        ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"],
        [*GQA, *TIED],
    ),
    "single": (1, [], [*GQA, *TIED]),
    # Two key heads for four ranks: each is on two of them.
    "tp4": (4, ["parallel.tensor=4", "parallel.expert=2"], GQA),
    "span": (
        4,
        [
            "parallel.tensor=2",
            "parallel.pipeline=2",
            "parallel.placement=span",
            "parallel.expert=4",
        ],
        GQA,
    ),
}


def targets() -> Array:
    """[BATCH, SEQUENCE + 1]"""
    return np.random.default_rng(8).integers(0, VOCAB, (BATCH, SEQUENCE + 1))


@dataclass
class Answer:
    loss: float
    weights: dict[str, Array]
    """By global key."""
    gradients: dict[str, Array]


def by_global_key(folder: HfFolder, named: dict[str, torch.Tensor]) -> dict[str, Array]:
    """Transformers' tensors, as in its memory, under our keys."""
    units: dict[str, list[Array]] = {}
    for entry, layer in folder.architecture.tensors(folder.model, stacked=True):
        _, unit = entry.to_ours(
            lambda name, shape: ("", named[name].detach().numpy()), folder.model, layer, VOCAB
        )
        units.setdefault(entry.key.key, []).append(unit)
    layered = "decoder.layers."
    return {k: np.stack(u) if k.startswith(layered) else u[0] for k, u in units.items()}


def oracle(folder: HfFolder, network: Any) -> Answer:
    network.train()
    network.zero_grad()
    batch = torch.from_numpy(targets())
    logits = network(input_ids=batch[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    state = dict(network.state_dict(keep_vars=True))
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in state.items()
    }
    return Answer(loss.item(), by_global_key(folder, state), by_global_key(folder, gradients))


def _ours(rank: int, world: int, folders: Sequence[str], layout: list[str]) -> Any:
    from moe_train.backend.groups import close_world
    from moe_train.convert.loading import load_weights
    from moe_train.train.step import train_step

    answers = {}
    for folder in folders:
        opened = open_folder(Path(folder))
        run = [
            *overrides_of(opened.model),
            *(f"data.sequence={SEQUENCE}", f"batch.global={BATCH}", "batch.micro=1"),
            *("recompute=none", "parallel=single", "dtype=fp32", "optim.clip=0", *layout),
        ]
        engine = open_engine(rank, world, run, VOCAB)
        load_weights(opened, [chunk.module for chunk in engine.chunks])
        weights = shards(engine)
        result = train_step(engine, micro_batches(engine, targets()), 1)
        answers[folder] = result.loss, weights, gradient_shards(engine)
        close_world()
    return answers


@pytest.fixture(scope="module")
def ours(saved: Any) -> Any:
    @cache
    def run(layout: str) -> dict[tuple[str, str], Answer]:
        world, overrides, cases = LAYOUTS[layout]
        folders = {case: str(saved(*case, False)) for case in cases}
        ranks = run_world(_ours, world, list(folders.values()), overrides)
        return {
            case: Answer(
                ranks[0][folder][0],
                assemble([rank[folder][1] for rank in ranks]),
                assemble([rank[folder][2] for rank in ranks]),
            )
            for case, folder in folders.items()
        }

    return run


@pytest.mark.world
@pytest.mark.parametrize(
    ("layout", "name", "shape"),
    [
        pytest.param(layout, *case, marks=[] if layout == "tp2pp2ep2" else [pytest.mark.full])
        for layout, (_, _, cases) in LAYOUTS.items()
        for case in cases
    ],
)
def test_gradients_are_those_of_transformers(
    layout: str, name: str, shape: str, networks: Any, saved: Any, ours: Any
) -> None:
    folder = open_folder(saved(name, shape, False))
    theirs, here = oracle(folder, networks(name, shape)), ours(layout)[name, shape]
    assert here.weights.keys() == theirs.weights.keys()
    for key, weight in theirs.weights.items():
        assert np.array_equal(weight, here.weights[key]), key
    assert here.loss == pytest.approx(theirs.loss, rel=1e-5)
    for key, gradient in here.gradients.items():
        size = np.abs(theirs.gradients[key]).max()
        assert size > 1e-4, f"{key}: the oracle's gradient proves nothing"
        np.testing.assert_allclose(
            gradient, theirs.gradients[key], rtol=1e-3, atol=1e-4 * size, err_msg=key
        )
    assert len(here.gradients) >= len(theirs.gradients) - 1
