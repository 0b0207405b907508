"""One trained checkpoint, loaded and saved again in many layouts, always gives the same export."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.config.compose import compose
from moe_train.convert.card import Facts
from moe_train.convert.exporting import export_checkpoint
from moe_train.convert.tokenizers import Tokens
from moe_train.testing.world import run_world
from tests.support.engines import micro_batches, open_engine

VOCAB, SEQUENCE, BATCH, STEPS = 120, 16, 8, 5
SMALL = [
    *("model.layers=4", "model.hidden=64", "model.heads=8", "model.kv_heads=4", "model.head_dim=8"),
    *("model.experts=8", "model.experts_per_token=4", "model.expert_hidden=32"),
    *(f"model.vocab={VOCAB}", f"data.sequence={SEQUENCE}", f"batch.global={BATCH}"),
    *("batch.micro=1", "optim.lr=1e-2", "optim.warmup_steps=0", "recompute=none"),
    "parallel=single",
]
R = "model.router."
MODELS = {
    "glm4_moe": [
        *(R + "score=sigmoid", R + "expert_bias=true", R + "balancing=none", R + "groups=4"),
        *(R + "groups_per_token=2", R + "scaling_factor=1.5", "model.shared_expert_hidden=64"),
        *("model.qk_norm=head", R + "expert_bias_rate=0.01"),
    ],
    "olmoe": ["model.qk_norm=full", R + "pre_softmax=true", "dtype=bf16"],
}
SPAN = ["parallel.tensor=2", "parallel.pipeline=4", "parallel.expert=8", "parallel.placement=span"]
LAYOUTS = {
    "TP2.PP2.EP2": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"]),
    "DP2 distributed": (2, ["optim.distributed=true"]),
    "TP2.ETP2": (2, ["parallel.tensor=2", "parallel.expert_tensor=2", "parallel.expert=1"]),
    "EP8": (8, ["parallel.expert=8"]),
    "span of 8": (8, SPAN),
}


def _train(rank: int, world: int, overrides: list[str], root: str) -> str:
    from moe_train.train.step import train_step

    engine = open_engine(rank, world, overrides, VOCAB)
    tokens = np.random.default_rng(3).integers(0, VOCAB, (BATCH, SEQUENCE + 1))
    losses = [
        train_step(engine, micro_batches(engine, tokens), step).loss for step in range(1, STEPS + 1)
    ]
    assert losses[-1] < losses[0]
    return _save(engine, root)


def _save(engine: Any, root: str) -> str:
    from moe_train.checkpoint.manifest import identity
    from moe_train.checkpoint.save import Save

    run = engine.run
    fields = {
        "model": identity(run.config.model, run.padded_vocab),
        "layout": run.layout.tag,
        "world": run.layout.world,
        "seed": 0,
        "tokenizer": "unknown",
        "consumed_samples": STEPS * BATCH,
        "consumed_tokens": STEPS * BATCH * SEQUENCE,
    }
    chunks = [chunk.module for chunk in engine.chunks]
    save = Save(
        Path(root), step=STEPS, chunks=chunks, optimizer=engine.optimizer, fields=fields, keep=1
    )
    return str(save.commit())


def _load_and_save(rank: int, world: int, overrides: list[str], source: str, root: str) -> str:
    from moe_train.checkpoint.load import load_checkpoint
    from moe_train.checkpoint.manifest import read_manifest

    engine = open_engine(rank, world, overrides, VOCAB)
    load_checkpoint(
        Path(source),
        read_manifest(Path(source)),
        chunks=[chunk.module for chunk in engine.chunks],
        optimizer=engine.optimizer,
        layout=engine.run.layout.tag,
    )
    return _save(engine, root)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("trained")

    @cache
    def train(name: str) -> tuple[str, str]:
        """Checkpoint of one rank, and the digest of its export."""
        overrides = [*SMALL, *MODELS[name]]
        [checkpoint] = run_world(_train, 1, overrides, str(root / name))
        return checkpoint, digest(name, checkpoint, root / f"{name}-out")

    return train


def digest(name: str, checkpoint: str, out: Path) -> str:
    config = compose(["device=cpu", *SMALL, *MODELS[name]])
    done = export_checkpoint(
        Path(checkpoint), out, config, tokens=Tokens(positions=SEQUENCE), facts=Facts()
    )
    assert done.architecture.name == name
    return done.record.weights_sha256


@pytest.mark.world
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name == "TP2.PP2.EP2" else [pytest.mark.full])
        for name in LAYOUTS
    ],
)
def test_every_layout_exports_the_same(
    layout: str, name: str, trained: Any, tmp_path: Path
) -> None:
    checkpoint, expected = trained(name)
    world, sizes = LAYOUTS[layout]
    overrides = [*SMALL, *MODELS[name], *sizes]
    again, *_ = run_world(_load_and_save, world, overrides, checkpoint, str(tmp_path / "again"))
    assert digest(name, again, tmp_path / "out") == expected
