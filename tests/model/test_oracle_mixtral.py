"""An oracle that is not ours: the same weights in Transformers' Mixtral."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_train.config.compose import compose
from moe_train.config.model import ModelConfig, RouterConfig
from moe_train.config.schema import with_values
from moe_train.convert import mixtral
from moe_train.errors import ConfigError
from moe_train.testing.world import run_world
from tests.support.engines import (
    assemble,
    fill,
    gradient_shards,
    micro_batches,
    open_engine,
    shards,
)

VOCAB, SEQUENCE, BATCH = 128, 24, 4
MODEL = [
    "model.layers=4",
    "model.hidden=64",
    "model.heads=8",
    "model.head_dim=12",
    "model.experts=8",
    "model.expert_hidden=40",
    f"model.vocab={VOCAB}",
    "model.rope_base=5000",
    "model.norm_epsilon=1e-5",
    "model.router.balancing=none",
    f"data.sequence={SEQUENCE}",
    f"batch.global={BATCH}",
    "batch.micro=2",
    "recompute=none",
    "parallel=single",
    "optim.clip=0",
]
# Big enough that attention and routing are far from uniform and every gradient counts.
STD = 0.12
LAYOUTS = {
    1: [],
    4: ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"],
}


def variant(kv_heads: int, top_k: int) -> list[str]:
    return [
        f"model.kv_heads={kv_heads}",
        f"model.experts_per_token={top_k}",
        # Both sides refuse to train a softmax over one choice; see `ours`.
        f"model.router.pre_softmax={'true' if top_k == 1 else 'false'}",
    ]


def tokens() -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).integers(0, VOCAB, (BATCH, SEQUENCE + 1))


@dataclasses.dataclass
class Answer:
    """What a model says: logits [BATCH, SEQUENCE, VOCAB], loss, weights, gradients."""

    logits: np.ndarray[Any, Any]
    loss: float
    weights: dict[str, np.ndarray[Any, Any]]
    gradients: dict[str, np.ndarray[Any, Any]]


def sizes(kv_heads: int) -> mixtral.Sizes:
    return mixtral.Sizes(
        layers=4, heads=8, kv_heads=kv_heads, experts=8, vocab=VOCAB, padded_vocab=VOCAB
    )


def by_global_key(named: dict[str, torch.Tensor], sizes: mixtral.Sizes) -> dict[str, Any]:
    """Foreign tensors as ours, through the table under test."""
    ours: dict[str, Any] = {}
    for key, place, tensor in mixtral.from_mixtral(named.__getitem__, sizes, mixtral.MODULE_TABLE):
        ours.setdefault(key, {})[place] = tensor.detach().numpy()
    return {
        key: units[()] if () in units else np.stack([units[i,] for i in range(sizes.layers)])
        for key, units in ours.items()
    }


@cache
def oracle(kv_heads: int, top_k: int, renormalise: bool) -> Answer:
    transformers = pytest.importorskip("transformers")
    model = compose([*MODEL, *variant(kv_heads, top_k)]).model
    model = with_values(model, {"router.pre_softmax": False, "init_std": STD})
    settings = mixtral.mixtral_config(model, VOCAB, SEQUENCE)
    torch.manual_seed(11)
    config = transformers.MixtralConfig(**settings, attn_implementation="eager")
    network = transformers.MixtralForCausalLM(config).train()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    if not renormalise:
        for layer in network.model.layers:
            layer.mlp.gate.register_forward_hook(_plain_probabilities)
    batch = torch.from_numpy(tokens())
    logits = network(input_ids=batch[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    named = dict(network.named_parameters())
    zero = {name: torch.zeros_like(p) for name, p in named.items()}
    gradients = {name: zero[name] if p.grad is None else p.grad for name, p in named.items()}
    return Answer(
        logits.detach().numpy(),
        loss.item(),
        by_global_key(named, sizes(kv_heads)),
        by_global_key(gradients, sizes(kv_heads)),
    )


def _plain_probabilities(gate: Any, inputs: Any, output: Any) -> Any:
    """Softmax over all experts as it is, without Mixtral's division by the chosen ones' sum."""
    logits, _, chosen = output
    return logits, logits.float().softmax(-1).gather(-1, chosen), chosen


def _ours(rank: int, world: int, overrides: list[str], weights: Any, renormalise: bool) -> Any:
    from moe_train.train.step import train_step

    engine = open_engine(rank, world, overrides, VOCAB)
    # Megatron refuses this at top-1, where the probability is the constant 1, for training;
    # such a Mixtral can be evaluated all the same.
    engine.megatron.moe_router_pre_softmax = not renormalise
    fill(engine, weights)
    logits: list[Any] = []
    last = engine.chunks[-1].module
    if engine.is_last_stage:
        last.output_layer.register_forward_hook(
            lambda module, inputs, output: logits.append(output[0].detach().numpy().copy())
        )
    filled = shards(engine)
    result = train_step(engine, micro_batches(engine, tokens()), 1)
    where = (engine.groups.dp.rank(), engine.groups.tp.rank())
    return where, logits, result.loss, gradient_shards(engine), filled


def ours(world: int, kv_heads: int, top_k: int, renormalise: bool) -> Answer:
    theirs = oracle(kv_heads, top_k, renormalise)
    overrides = [*MODEL, *LAYOUTS[world], *variant(kv_heads, top_k)]
    ranks = run_world(_ours, world, overrides, theirs.weights, renormalise)
    rows: dict[int, dict[int, np.ndarray[Any, Any]]] = {}
    data = 1 + max(where[0] for where, *_ in ranks)
    for (dp, tp), logits, *_ in ranks:
        for index, part_SBV in enumerate(logits):
            rows.setdefault(index * data + dp, {})[tp] = part_SBV.transpose(1, 0, 2)
    whole = [
        np.concatenate([parts[tp] for tp in sorted(parts)], -1) for _, parts in sorted(rows.items())
    ]
    return Answer(
        np.concatenate(whole),
        ranks[0][2],
        assemble([rank[4] for rank in ranks]),
        assemble([rank[3] for rank in ranks]),
    )


CASES = [
    pytest.param(8, 2, True, id="top2"),
    pytest.param(2, 2, True, id="gqa-top2"),
    pytest.param(2, 1, True, id="gqa-top1"),
    pytest.param(8, 1, False, id="top1-without-renormalisation"),
]


@pytest.mark.world
@pytest.mark.parametrize("world", [1, pytest.param(4, id="tp2pp2ep2")])
@pytest.mark.parametrize(("kv_heads", "top_k", "renormalise"), CASES)
def test_same_weights_say_the_same(
    world: int, kv_heads: int, top_k: int, renormalise: bool
) -> None:
    theirs = oracle(kv_heads, top_k, renormalise)
    here = ours(world, kv_heads, top_k, renormalise)
    assert here.weights.keys() == theirs.weights.keys() == here.gradients.keys()
    for key, weight in theirs.weights.items():
        assert np.array_equal(weight, here.weights[key]), key
    assert np.abs(theirs.logits).max() > 1
    np.testing.assert_allclose(here.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    assert here.loss == pytest.approx(theirs.loss, rel=1e-5)
    for key, gradient in theirs.gradients.items():
        size = np.abs(gradient).max()
        if top_k == 1 and renormalise and key.endswith("router.weight"):
            # The one probability is constant, so only rounding could reach the router.
            assert np.abs(here.gradients[key]).max() < 1e-6
            continue
        assert size > 1e-4, f"{key}: the oracle's gradient proves nothing"
        np.testing.assert_allclose(
            here.gradients[key], gradient, rtol=1e-3, atol=1e-4 * size, err_msg=key
        )


def random_model(kv_heads: int) -> dict[str, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    model = compose([*MODEL, *variant(kv_heads, 2)]).model
    config = transformers.MixtralConfig(**mixtral.mixtral_config(model, VOCAB, SEQUENCE))
    return dict(transformers.MixtralForCausalLM(config).state_dict())


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_out_and_back_is_the_identity(kv_heads: int) -> None:
    named = random_model(kv_heads)
    for table in (mixtral.MODULE_TABLE, mixtral.FILE_TABLE):
        whole = {
            (key, place): tensor
            for key, place, tensor in mixtral.from_mixtral(
                named.__getitem__, sizes(kv_heads), mixtral.MODULE_TABLE
            )
        }

        def read(
            key: str, place: tuple[int, ...], whole: dict[Any, torch.Tensor] = whole
        ) -> torch.Tensor:
            if (key, place) in whole:
                return whole[key, place]
            return whole[key, place[:1]][place[1]]

        there = dict(mixtral.to_mixtral(read, sizes(kv_heads), table))
        back = mixtral.from_mixtral(there.__getitem__, sizes(kv_heads), table)
        count = 0
        for key, place, tensor in back:
            assert torch.equal(tensor, read(key, place)), key
            count += tensor.numel()
        assert count == sum(tensor.numel() for tensor in named.values())


def test_file_names_are_those_that_transformers_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    model = compose([*MODEL, *variant(2, 2)]).model
    config = transformers.MixtralConfig(**mixtral.mixtral_config(model, VOCAB, SEQUENCE))
    network = transformers.MixtralForCausalLM(config)
    network.save_pretrained(tmp_path)
    written = safetensors.load_file(tmp_path / "model.safetensors")
    expected = {
        name
        for entry in mixtral.FILE_TABLE
        for place in entry.places(sizes(2))
        for name in entry.names(place)
    }
    assert set(written) == expected
    inside = network.state_dict()
    stacked = {
        (key, place): tensor
        for key, place, tensor in mixtral.from_mixtral(
            inside.__getitem__, sizes(2), mixtral.MODULE_TABLE
        )
    }
    for key, place, tensor in mixtral.from_mixtral(written.__getitem__, sizes(2)):
        unit = stacked[key, place] if len(place) < 2 else stacked[key, place[:1]][place[1]]
        assert torch.equal(tensor, unit), (key, place)


def test_padding_rows_come_and_go() -> None:
    padded = dataclasses.replace(sizes(2), vocab=100, padded_vocab=VOCAB)
    embedding = torch.randn(100, 8)
    entry = mixtral.FILE_TABLE[0]
    ours = entry.transform.to_megatron((embedding,), padded)
    assert ours.shape == (VOCAB, 8) and not ours[100:].any()
    assert torch.equal(entry.transform.to_hf(ours, padded)[0], embedding)


def test_tied_models_have_no_head() -> None:
    tied = dataclasses.replace(sizes(2), tied=True)
    keys = {entry.key for entry in mixtral.entries(mixtral.FILE_TABLE, tied)}
    assert "output_layer.weight" not in keys and "embedding.word_embeddings.weight" in keys


def test_config_out_and_back() -> None:
    transformers = pytest.importorskip("transformers")
    model = compose([*MODEL, *variant(2, 2)]).model
    config = transformers.MixtralConfig(**mixtral.mixtral_config(model, VOCAB, SEQUENCE))
    fields = mixtral.model_fields(config.to_dict())
    overrides = [f"{key}={value}" for key, value in fields.items()]
    again = compose([*overrides, "recompute=none"]).model
    for key in fields:
        name = key.removeprefix("model.")
        assert getattr(again, name) == getattr(model, name), key


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (ModelConfig(shared_expert_hidden=8), "model.shared_expert_hidden"),
        (ModelConfig(router=RouterConfig(score="sigmoid")), "model.router.score"),
        (ModelConfig(router=RouterConfig(pre_softmax=True)), "model.router.pre_softmax"),
        (ModelConfig(router=RouterConfig(capacity_factor=1.0)), "model.router.capacity_factor"),
    ],
)
def test_other_models_are_refused(model: ModelConfig, field: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        mixtral.mixtral_config(model, VOCAB, SEQUENCE)
    assert refusal.value.field == field


def test_foreign_features_are_refused() -> None:
    with pytest.raises(ConfigError) as refusal:
        mixtral.model_fields({"sliding_window": 4096})
    assert refusal.value.field == "sliding_window"
