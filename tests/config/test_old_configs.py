"""A run's config.yaml of version 0.1 is read under the present names of its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_train.config.compose import typed
from moe_train.config.files import read_config
from moe_train.config.root import Config
from moe_train.config.schema import OLD_KEYS, dotted_keys, unknown_key, value_at

FILES = sorted((Path(__file__).parent / "data").glob("config_0.1_*.yaml"))
"""Resolved by 0.1: `single`, `twin`, and `moe_30b_8x64gb` with settings of NCCL and Megatron."""


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; what a mapping field holds is one value."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        name = prefix + key
        name = OLD_KEYS.get(name, name)
        if isinstance(value, dict) and any(k.startswith(name + ".") for k in dotted_keys(Config)):
            values |= leaves(value, name + ".")
        else:
            values[name] = value
    return values


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_arrives(path: Path) -> None:
    written = leaves(yaml.safe_load(path.read_text()))
    config = typed(read_config(path))
    assert len(written) > 120
    if written["megatron.transformer"].pop("qk_layernorm", False):
        written["model.qk_norm"] = "head"
    groups = written.pop("backend.nccl_groups")
    assert {key: value_at(config, key) for key in written} == written
    assert {name: vars(group) for name, group in config.backend.nccl_groups.items()} == groups


def test_old_names_lead_to_present_keys() -> None:
    known = dotted_keys(Config)
    assert len(FILES) == 3
    assert set(OLD_KEYS.values()) <= set(known) and not set(OLD_KEYS) & set(known)
    for old, new in OLD_KEYS.items():
        assert new in unknown_key(old, known).fix
