"""Random configs near the border of the legal: most of them one change away from it."""

from __future__ import annotations

import random
from typing import Any

from moe_train.config.compose import compose
from moe_train.config.root import Config
from moe_train.config.schema import from_mapping, to_mapping

BASE = [
    "experiment=single", "model.hidden=64", "model.head_dim=8", "model.heads=8", "model.experts=8",
    "model.layers=8", "model.vocab=512", "model.expert_hidden=64", "data.sequence=64",
    "batch.microbatches=8",
]  # fmt: skip

GRIDS = (
    # tensor, pipeline, virtual pipeline, expert, expert tensor, factor of the world they need
    (1, 1, 1, 1, 1), (1, 1, 1, 2, 1), (2, 1, 1, 2, 1), (2, 2, 1, 2, 1), (2, 1, 1, 1, 2),
    (1, 2, 1, 4, 1), (2, 4, 1, 2, 1), (4, 1, 1, 4, 1), (4, 2, 1, 2, 2), (1, 2, 2, 2, 1),
    (2, 2, 2, 2, 1), (1, 4, 2, 2, 1), (8, 1, 1, 8, 1), (2, 2, 4, 4, 1), (1, 8, 1, 2, 1),
)  # fmt: skip

CHANGES: dict[str, list[Any]] = {
    "dtype": ["fp32", "bf16"],
    "model.layers": [4, 6, 8, 12],
    "model.hidden": [32, 48, 64, 72],
    "model.heads": [2, 4, 6, 8, 12],
    "model.kv_heads": [None, 1, 2, 3, 4, 8],
    "model.head_dim": [2, 6, 7, 8, 16, None],
    "model.experts": [4, 6, 8, 16],
    "model.experts_per_token": [1, 2, 3, 8, 9],
    "model.expert_hidden": [32, 50, 64, 96],
    "model.shared_expert_hidden": [0, 32, 33, 96],
    "model.vocab": [250, 500, 1000],
    "model.vocab_multiple": [1, 6, 64, 128],
    "model.tied_embeddings": [True, False],
    "model.router.score": ["softmax", "sigmoid"],
    "model.router.balancing": ["aux", "seq_aux", "global_aux", "sinkhorn", "none"],
    "model.router.expert_bias": [False, True],
    "model.router.capacity_factor": [None, 1.0, 1.5],
    "model.router.drop_policy": ["probs", "position"],
    "model.router.pad_to_capacity": [False, True],
    "model.router.groups": [None, 2, 3, 4],
    "model.router.groups_per_token": [None, 1, 2, 4],
    "model.router.pre_softmax": [True, False],
    "model.router.scaling_factor": [None, 2.5],
    "model.router.z_coeff": [0.0, 1e-3],
    "parallel.tensor": [1, 2, 3, 4, 8, 16],
    "parallel.pipeline": [1, 2, 3, 4, 8],
    "parallel.virtual_pipeline": [1, 2, 3, 4],
    "parallel.context": [1, 2, 4],
    "parallel.expert": [1, 2, 3, 4, 8],
    "parallel.expert_tensor": [1, 2, 4],
    "parallel.dispatcher": ["alltoall", "allgather", "flex"],
    "parallel.overlap_expert_comm": [True],
    "parallel.overlap_grad_reduce": [True, False],
    "parallel.overlap_param_gather": [True, False],
    "recompute.layers": ["none", "all", "2-3", "1,4"],
    "recompute.modules": [[], ["moe_act"], ["layernorm", "shared_experts"], ["moe"], ["core_attn"]],
    "data.sequence": [48, 62, 64, 96, 100],
    "batch.micro": [1, 2],
    "batch.microbatches": [2, 4, 6, 8],
    "batch.accumulation": [1, 2],
    "batch.global": [None, 16, 24],
    "optim.distributed": [True, False],
    "optim.precision_aware": [True],
    "optim.moment_dtype": ["fp32", "bf16"],
    "optim.grad_dtype": ["fp32", "bf16"],
}

TOGETHER: tuple[dict[str, Any], ...] = (
    # Options that are legal in company only.
    {"dtype": "bf16", "parallel.overlap_expert_comm": True},
    {"dtype": "bf16", "optim.distributed": True, "optim.precision_aware": True,
     "optim.moment_dtype": "bf16", "optim.grad_dtype": "bf16"},
    {"model.router.score": "sigmoid", "model.router.expert_bias": True},
    {"model.router.groups": 4, "model.router.groups_per_token": 2},
    {"model.router.capacity_factor": 1.0, "model.router.pad_to_capacity": True},
    {"dtype": "fp8", "model.head_dim": 16},
    {"parallel.context": 2},
    {"parallel.dispatcher": "flex"},
)  # fmt: skip

_WORLDS = (1, 1, 1, 2, 2, 3, 4)


def base(device: str) -> dict[str, Any]:
    """Nested mapping of the legal config that every draw starts from."""
    mapping = to_mapping(compose([*BASE, f"device={device}"]))
    return mapping  # type: ignore[no-any-return]


def draw(
    chance: random.Random, start: dict[str, Any], placement: str
) -> tuple[Config, int, dict[str, Any]]:
    """A config, a world size and what was changed.

    A grid that is legal as it stands, some options in company, and none to three single changes.
    """
    tensor, pipeline, chunks, expert, expert_tensor = chance.choice(GRIDS)
    drawn: dict[str, Any] = {
        "parallel.auto": False,
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "parallel.virtual_pipeline": chunks,
        "parallel.context": 1,
        "parallel.expert": expert,
        "parallel.expert_tensor": expert_tensor,
        "parallel.placement": placement,
    }
    stage = max(tensor, expert * expert_tensor)
    if placement == "span":
        drawn |= {"parallel.virtual_pipeline": 1, "parallel.expert_tensor": 1}
        drawn["parallel.expert"] = tensor * pipeline
        stage = tensor
    world = stage * pipeline * chance.choice(_WORLDS)
    if chance.random() < 0.3:
        combined = chance.choice(TOGETHER)
        drawn |= combined
        world *= combined.get("parallel.context", 1)
    for key in chance.sample(sorted(CHANGES), chance.choice((0, 1, 1, 2, 3))):
        drawn[key] = chance.choice(CHANGES[key])
    return applied(start, drawn), world, drawn


def applied(start: dict[str, Any], drawn: dict[str, Any]) -> Config:
    """The typed config of `start` with dotted keys changed."""
    mapping = {key: _copy(value) for key, value in start.items()}
    for key, value in drawn.items():
        *groups, last = key.split(".")
        node = mapping
        for group in groups:
            node = node[group]
        node[last] = value
    config, faults = from_mapping(Config, mapping)
    assert not faults, faults
    return config


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value
