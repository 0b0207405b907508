"""config.json both ways, against Transformers' config classes; the choice and its reasons."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.config.model import ModelConfig
from moe_train.config.schema import with_values
from moe_train.convert.architecture import hf_config, model_mapping
from moe_train.convert.folder import model_of
from moe_train.convert.registry import ARCHITECTURES, FOREIGN, architecture_of, choose
from moe_train.errors import ConfigError

transformers = pytest.importorskip("transformers")
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"qk_norm": "head", "router.pre_softmax": True},
    "olmoe": {"qk_norm": "full", "router.pre_softmax": True},
    "glm4_moe": {
        "shared_expert_hidden": 96,
        "router.score": "sigmoid",
        "router.expert_bias": True,
        "router.balancing": "none",
    },
}
BASE = ModelConfig(hidden=64, heads=8, experts=8, experts_per_token=4, expert_hidden=48, layers=3)


def model(name: str) -> ModelConfig:
    return with_values(BASE, MODELS[name])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    """A field that config.json leaves out has the value that Transformers gives it."""
    architecture = ARCHITECTURES[name]
    theirs = type(transformers.AutoConfig.for_model(name))()
    for field in architecture.fields:
        if field.default is not None:
            assert getattr(theirs, field.name) == field.default, field.name
        for alias in field.aliases:
            assert getattr(theirs, alias) == getattr(theirs, field.name), alias
    for fixed in architecture.fixed:
        assert getattr(theirs, fixed.name) == fixed.default, fixed.name
    assert theirs.rope_parameters["rope_theta"] == architecture.rope_base
    factor = theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert factor == architecture.partial_rotary_factor
    fields = theirs.to_dict()
    needed = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    for name, value in (("first_k_dense_replace", 0), ("sliding_window", None)):
        needed |= {name: value} if name in fields else {}
    needed |= {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}}
    # Every field that the class writes is known, so that a folder is not refused for one.
    model_of(model_mapping(architecture, fields | needed | {"num_key_value_heads": 2}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_out_is_what_transformers_reads(name: str) -> None:
    ours = model(name)
    fields = hf_config(ARCHITECTURES[name], ours, 384, "bfloat16", 256)
    theirs = transformers.AutoConfig.for_model(**fields)
    assert theirs.num_local_experts == ours.experts
    assert (theirs.vocab_size, theirs.head_dim if "head_dim" in fields else 8) == (384, 8)
    assert theirs.rope_parameters["rope_theta"] == ours.rope_base
    assert theirs.max_position_embeddings == 256 and str(theirs.dtype) == "torch.bfloat16"
    back = model_of(model_mapping(ARCHITECTURES[name], theirs.to_dict()))
    free = {
        "name": ours.name, "vocab": None, "kv_heads": None, "head_dim": None,
        "router.balancing": ours.router.balancing, "router.scaling_factor": None,
        "router.aux_coeff": ours.router.aux_coeff,
    }  # fmt: skip
    assert with_values(back, free) == ours


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_model_has_one_architecture(name: str) -> None:
    architecture, reasons = choose(model(name), {})
    assert architecture.name == name
    assert sum("fits: " in line for line in reasons) == 1
    assert len(reasons) == len(ARCHITECTURES)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"router.capacity_factor": 1.0}, "capacity_factor=1.0: tokens over the capacity"),
        ({"router.balancing": "sinkhorn"}, "balancing=sinkhorn"),
        ({"router.score": "sigmoid"}, "Mixtral: model.router.score=sigmoid"),
        ({"shared_expert_hidden": 48}, "Mixtral: model.shared_expert_hidden=48"),
        ({"router.scaling_factor": 2.5}, "scaling_factor=2.5"),
        ({"router.groups": 4, "router.groups_per_token": 2}, "Mixtral: model.router.groups=4"),
        ({"router.pre_softmax": True}, "Mixtral: model.router.pre_softmax=true"),
        ({"qk_norm": "full", "head_dim": 16}, "OLMoE: model.head_dim=16"),
        (MODELS["glm4_moe"] | {"shared_expert_hidden": 50}, "GLM-4-MoE: model.shared_expert"),
        (
            MODELS["glm4_moe"] | {"router.groups": 4, "router.groups_per_token": 1},
            "GLM-4-MoE: model.router.groups_per_token=1",
        ),
        (MODELS["glm4_moe"] | {"qk_norm": "full"}, "GLM-4-MoE: model.qk_norm=full"),
    ],
)
def test_a_model_that_fits_none(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        choose(with_values(BASE, changes), {})
    assert word in refusal.value.problem
    assert all(one.title in refusal.value.problem for one in ARCHITECTURES.values())


def test_megatron_options_that_change_the_function() -> None:
    with pytest.raises(ConfigError, match="rotary_percent"):
        choose(model("mixtral"), {"rotary_percent": 0.5})
    assert choose(model("mixtral"), {"moe_router_dtype": "fp64"})[0].name == "mixtral"


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_architectures_say_why(kind: str) -> None:
    """Each is a model of Transformers that really has what the message says."""
    with pytest.raises(ConfigError, match=FOREIGN[kind][:20]):
        architecture_of({"model_type": kind})
    theirs = type(transformers.AutoConfig.for_model(kind))()
    if "MLA" in FOREIGN[kind]:
        assert theirs.kv_lora_rank > 0
    if "no experts" in FOREIGN[kind]:
        assert not hasattr(theirs, "num_local_experts")


def test_a_router_that_could_not_be_trained_is_named() -> None:
    fields = hf_config(ARCHITECTURES["mixtral"], model("mixtral"), 128, "float32", 64)
    with pytest.raises(ConfigError) as refusal:
        model_mapping(ARCHITECTURES["mixtral"], fields | {"num_experts_per_tok": 1})
    assert refusal.value.field == "num_experts_per_tok"
