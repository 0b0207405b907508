"""Composition of the shipped groups, and clear words for what cannot be composed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from moe_train.config.compose import (
    collect,
    compose,
    config_dir,
    group_options,
    typed,
)
from moe_train.config.model import ModelConfig
from moe_train.config.schema import to_mapping
from moe_train.config.sweep import expand_multirun
from moe_train.errors import EXIT_CONFIG, ConfigFaults

GROUPS = [
    "model",
    "parallel",
    "data",
    "optim",
    "recompute",
    "checkpoint",
    "log",
    "hardware",
    "experiment",
]


def fixes(overrides: list[str]) -> dict[str, str]:
    with pytest.raises(ConfigFaults) as refused:
        compose(overrides)
    assert refused.value.exit_code == EXIT_CONFIG
    return {fault.field: f"{fault.problem} {fault.fix}" for fault in refused.value.faults}


def test_all_groups_are_there() -> None:
    assert {*GROUPS, "experiment"} <= set(group_options())


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g, options in group_options().items() for o in options]
)
def test_every_shipped_option_composes(group: str, option: str) -> None:
    needs = {
        "precision_aware": ["dtype=bf16"],
        **dict.fromkeys(("small", "moe_300m"), ["recompute=none"]),
    }
    compose([f"{group}={option}", *needs.get(option, [])])


def test_every_yaml_value_survives_into_the_typed_config() -> None:
    for name in group_options()["hardware"]:
        text = (config_dir() / "hardware" / f"{name}.yaml").read_text()
        typed = to_mapping(compose([f"hardware={name}"]).hardware)
        written = yaml.safe_load(text)
        assert {key: typed[key] for key in written} == written


def test_hardware_numbers_have_sources() -> None:
    for name in group_options()["hardware"]:
        hardware = compose([f"hardware={name}"]).hardware
        text = (config_dir() / "hardware" / f"{name}.yaml").read_text()
        # A node's devices are a matter of counting; every other number wants a source.
        no_numbers = {"name", "kind", "devices", "devices_per_node", "peak_known", "sources"}
        numbers = set(yaml.safe_load(text)) - no_numbers
        assert set(hardware.sources) == numbers, name
        undocumented = set(vars(hardware)) - numbers - no_numbers
        assert all(not getattr(hardware, field) for field in undocumented), name
        assert all(hardware.sources.values())


def test_the_mission_experiment() -> None:
    config = compose(["experiment=moe_30b_8x64gb"])
    model = config.model
    assert (model.layers, model.experts, model.heads, model.experts_per_token) == (16, 64, 16, 2)
    assert (model.hidden, model.head_dim, model.expert_hidden) == (4608, 128, 2048)
    assert (model.vocab, model.tied_embeddings) == (50304, False)
    assert (config.parallel.tensor, config.parallel.pipeline) == (2, 4)
    assert config.parallel.dispatcher == "alltoall"
    assert (config.batch.micro, config.batch.microbatches, config.batch.accumulation) == (1, 8, 4)
    assert config.recompute.layers == "2-15"
    assert config.dtype == "bf16"
    optim = config.optim
    assert optim.distributed and optim.precision_aware
    assert (optim.moment_dtype, optim.grad_dtype) == ("bf16", "bf16")
    assert config.data.sequence == 4096


def test_the_twin_has_the_missions_topology() -> None:
    twin, reference = compose(["experiment=twin"]), compose(["experiment=moe_30b_8x64gb"])
    for key in ("layers", "experts", "heads", "experts_per_token", "router"):
        assert getattr(twin.model, key) == getattr(reference.model, key)
    assert twin.recompute == reference.recompute
    assert twin.batch.microbatches == reference.batch.microbatches


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        ([], "2-15"),
        (["model.hidden=64"], "2-15"),
        (["experiment=twin"], "2-15"),
        (["experiment=twin", "model.layers=24"], "2-15"),
        (["experiment=moe_30b_8x64gb"], "2-15"),
        (["model.layers=24"], "none"),
        (["model=moe_1b"], "none"),
        (["experiment=auto", "model.layers=24"], "none"),
        (["model.layers=24", "recompute=reference"], "2-15"),
        (["model.layers=24", "recompute.layers=all"], "all"),
    ],
)
def test_an_own_model_inherits_no_recomputation(overrides: list[str], layers: str) -> None:
    assert compose(overrides).recompute.layers == layers


def test_overrides_reach_nulls_aliases_and_megatron_without_a_plus() -> None:
    config = compose(
        [
            "parallel.context=1",
            "batch.global=64",
            "optim.lr=1e-3",
            "train.steps=1e2",
            "+model.kv_heads=4",
            "megatron.transformer.attention_dropout=0.1",
            "recompute.layers='1,4-6'",
        ]
    )
    assert config.parallel.context == 1
    assert config.batch.global_ == 64
    assert config.optim.lr == 1e-3
    assert config.train.steps == 100
    assert config.model.kv_heads == 4
    assert config.megatron.transformer == {"attention_dropout": 0.1}
    assert config.recompute.layers == "1,4-6"


def test_a_command_line_override_beats_the_experiment() -> None:
    config = compose(["experiment=moe_30b_8x64gb", "model=twin", "train.steps=3"])
    assert config.model.name == "twin"
    assert config.train.steps == 3


def test_faults_of_every_stage_come_together() -> None:
    result = fixes(["model=foo", "train.steps=[", "nope", "modle.layers=3", "optim.lr=-1"])
    assert set(result) == {"model", "train.steps", "nope", "modle", "optim.lr"}
    assert "moe_30b" in result["model"] and "twin" in result["model"]
    assert "key=value" in result["nope"]


@pytest.mark.parametrize(
    ("overrides", "field", "word"),
    [
        (["model=twn"], "model", "twin"),
        (["recompute.layers=1,4-6"], "recompute.layers", "--multirun"),
        (["model={layers: 4}"], "model", "model.<name>"),
        (["train=3"], "train", "train.steps"),
        (["run.name=${no.such}"], "run.name", "no.such"),
        (["model._target_=os.system"], "model._target_", "refused"),
        (["backend.nccl._target_=os.system"], "backend.nccl._target_", "refused"),
        (["~no.such"], "overrides", "no.such"),
        (["~=FALSE"], "~=FALSE", "key=value"),
        (["megatron.transformr.x=1"], "megatron.transformr", "megatron.transformer"),
    ],
)
def test_what_cannot_be_composed_is_named(overrides: list[str], field: str, word: str) -> None:
    assert word in fixes(overrides)[field]


def test_nothing_is_written_and_nothing_moves(tmp_path: Path) -> None:
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        compose(["experiment=single"])
        assert os.getcwd() == str(tmp_path)
        assert not list(tmp_path.iterdir())
    finally:
        os.chdir(before)


def test_a_saved_config_is_read_back() -> None:
    config = compose(["experiment=single", "batch.global=16"])
    assert typed(yaml.safe_load(yaml.safe_dump(to_mapping(config)))) == config


def test_multirun() -> None:
    runs = expand_multirun(["optim.lr=1e-3,3e-3", "run.seed=range(0,2)", "experiment=single"])
    assert [compose(run).optim.lr for run in runs] == [1e-3, 1e-3, 3e-3, 3e-3]
    assert [compose(run).run.seed for run in runs] == [0, 1, 0, 1]
    assert expand_multirun(["a=1"]) == [["a=1"]]
    with pytest.raises(ConfigFaults):
        expand_multirun(["a=1,["])


def test_collect_hands_faults_back() -> None:
    config, result = collect(["model.layer=3", "train.steps=9"])
    assert config.train.steps == 9
    assert [f.field for f in result] == ["model.layer"]


def test_a_group_can_be_a_file_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("layers: 3\nheads: 4\nhead_dim: 12\nrouter: {pre_softmax: true}\n")
    config = compose(["experiment=twin", "recompute=none", f"model={path}", "model.heads=6"])
    assert (config.model.layers, config.model.heads, config.model.head_dim) == (3, 6, 12)
    assert config.model.router.pre_softmax
    # What neither says has the dataclass's default, not the twin's.
    assert config.model.hidden == ModelConfig().hidden != compose(["model=twin"]).model.hidden
    assert config.optim.lr == 6e-4


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("- layers", "is not a mapping"),
        ("defaults: [/hardware/cpu]", "is not a mapping"),
        ("layers: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_group(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigFaults, match=problem):
        compose([f"model={path}"])


def test_unknown_keys_of_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("layer: 3\n")
    with pytest.raises(ConfigFaults, match="model.layer: unknown key"):
        compose(["recompute=none", f"model={path}"])
