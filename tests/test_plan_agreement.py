"""What the planner accepts, Megatron's own configuration accepts; sampled at random."""

from __future__ import annotations

import random
import warnings

import pytest
import yaml

from moe_train.config.compose import compose
from moe_train.config.convert import from_mapping, to_mapping
from moe_train.config.root import Config
from moe_train.errors import ConfigError
from moe_train.plan.legality import check
from moe_train.plan.search import planned, resolve

DRAWS: dict[str, list[str]] = {
    "dtype": ["fp32", "bf16"],
    "model.layers": ["4", "6", "8"],
    "model.heads": ["4", "6", "8"],
    "model.kv_heads": ["null", "2", "3", "4"],
    "model.experts": ["4", "6", "8"],
    "model.experts_per_token": ["1", "2", "3"],
    "model.shared_expert_hidden": ["0", "96"],
    "model.router.score": ["softmax", "sigmoid"],
    "model.router.balancing": ["aux", "seq_aux", "global_aux", "sinkhorn", "none"],
    "model.router.expert_bias": ["false", "false", "true"],
    "model.router.capacity_factor": ["null", "null", "1.5"],
    "model.router.pad_to_capacity": ["false", "false", "true"],
    "model.router.groups": ["null", "null", "2", "4"],
    "model.router.groups_per_token": ["null", "null", "1", "2"],
    "model.router.pre_softmax": ["true", "false"],
    "parallel.tensor": ["1", "2", "4"],
    "parallel.pipeline": ["1", "2", "3"],
    "parallel.virtual_pipeline": ["1", "1", "2"],
    "parallel.expert": ["1", "2", "3", "4"],
    "parallel.expert_tensor": ["1", "2"],
    "parallel.dispatcher": ["alltoall", "allgather"],
    "parallel.overlap_expert_comm": ["false", "false", "true"],
    "recompute.layers": ["none", "none", "all", "2-3"],
    "recompute.modules": ["[]", "[]", "[moe_act]", "[layernorm,shared_experts]", "[moe]"],
    "batch.microbatches": ["4", "6"],
}
BASE = ["experiment=single", "model.hidden=48", "model.head_dim=8", "optim.lr=1e-3"]


def test_accepted_configs_construct_in_megatron() -> None:
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moe_train.backend.host.backend import HostBackend
        from moe_train.model.transformer_config import transformer_config
    draw, accepted, refused = random.Random(7), 0, 0
    base = compose(BASE)
    backend = HostBackend(base.backend)
    for _ in range(400):
        # Few options at a time leave a fair share of legal configs.
        drawn = {key: draw.choice(DRAWS[key]) for key in draw.sample(sorted(DRAWS), 6)}
        mapping = to_mapping(base)
        for key, text in drawn.items():
            *groups, last = key.split(".")
            node = mapping
            for group in groups:
                node = node[group]
            node[last] = yaml.safe_load(text)
        config, faults = from_mapping(Config, mapping)
        assert not faults
        world = draw.choice([1, 2, 4, 6, 8, 12])
        config = resolve(config, world)
        if check(config, world):
            refused += 1
            continue
        layout = planned(config, world)
        accepted += 1
        assert layout.data >= 1 and layout.expert_data >= 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                transformer_config(config, backend)
        except ConfigError as error:
            pytest.fail(f"accepted, but Megatron refuses {drawn}: {error}")
    assert min(accepted, refused) > 40
