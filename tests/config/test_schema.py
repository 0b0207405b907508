"""Strict conversion: nothing lost, nothing guessed, all faults together."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.config.root import Config
from moe_train.config.schema import (
    dotted_keys,
    from_mapping,
    key_of,
    to_mapping,
    value_at,
    with_values,
)


def faults(mapping: dict[str, Any]) -> dict[str, str]:
    return {f.field: f.fix for f in from_mapping(Config, mapping)[1]}


def test_round_trip_of_the_defaults() -> None:
    again, refused = from_mapping(Config, to_mapping(Config()))
    assert not refused
    assert again == Config()


def test_a_config_is_changed_by_copies_only() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3  # type: ignore[misc]
    other = with_values(config, {"train.steps": 3, "batch.global": 8})
    assert (value_at(other, "train.steps"), value_at(other, "batch.global")) == (3, 8)
    assert config == Config()


def test_key_alias_of_a_python_keyword() -> None:
    config, refused = from_mapping(Config, {"batch": {"global": 64}})
    assert not refused
    assert config.batch.global_ == 64
    assert to_mapping(config)["batch"]["global"] == 64
    assert "batch.global_" in faults({"batch": {"global_": 64}})


@pytest.mark.parametrize(
    ("section", "key", "given_", "want"),
    [
        ("optim", "lr", 1, 1.0),
        ("train", "steps", 1000.0, 1000),
        ("run", "name", 7, "7"),
        ("recompute", "layers", 4, "4"),
        ("model", "kv_heads", None, None),
        ("data", "train", ["a", "0.5:b"], ["a", "0.5:b"]),
        ("backend", "nccl", {"IB_QPS_PER_CONNECTION": 2}, {"IB_QPS_PER_CONNECTION": "2"}),
        ("hardware", "peak_tflops", {"bf16": 312}, {"bf16": 312.0}),
    ],
)
def test_lossless_coercion(section: str, key: str, given_: Any, want: Any) -> None:
    config, refused = from_mapping(Config, {section: {key: given_}})
    assert not refused
    got = getattr(getattr(config, section), key)
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "steps", "3"),
        ("train", "steps", 2.5),
        ("train", "steps", True),
        ("train", "steps", None),
        ("optim", "lr", "1e-3"),
        ("optim", "lr", False),
        ("optim", "distributed", 1),
        ("optim", "distributed", "true"),
        ("run", "name", 1.5),
        ("data", "train", "data/web"),
        ("data", "train", [1.5]),
        ("backend", "nccl", ["X"]),
        ("model", "router", 3),
    ],
)
def test_lossy_values_are_refused_and_named(section: str, key: str, value: Any) -> None:
    config, refused = from_mapping(Config, {section: {key: value}})
    assert [f.field.partition("[")[0] for f in refused][0] == f"{section}.{key}"
    default = getattr(getattr(Config(), section), key)
    assert getattr(getattr(config, section), key) == default


def test_unknown_keys_name_the_nearest() -> None:
    fixes = faults({"model": {"layer": 3}, "optm": {}, "lr": 1.0, "batch": {"zzz": 1}})
    assert "model.layers" in fixes["model.layer"]
    assert "optim" in fixes["optm"]
    assert "optim.lr" in fixes["lr"]
    assert "batch.micro" in fixes["batch.zzz"]


def test_all_faults_come_together() -> None:
    assert len(faults({"model": {"layer": 3, "hidden": "x"}, "train": {"steps": 1.5}})) == 3


def test_every_field_is_reachable_by_its_dotted_key() -> None:
    keys = dotted_keys(Config)
    assert len(keys) == len(set(keys))
    assert {"batch.global", "model.router.score", "megatron.transformer"} <= set(keys)
    for field in dataclasses.fields(Config):
        assert key_of(field.name) in keys


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "3"])
SHORT = st.sampled_from(["layers", "lr", "router", "x"])
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(SHORT, SCALARS, max_size=2)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from([*dotted_keys(Config)[:9], "model", "optim"]), VALUES))
def test_any_mapping_gives_faults_and_never_an_exception(mapping: dict[str, Any]) -> None:
    config, refused = from_mapping(Config, mapping)
    again, none = from_mapping(Config, to_mapping(config))
    assert not none
    assert repr(again) == repr(config)
    assert all(f.field and f.problem and f.fix for f in refused)
