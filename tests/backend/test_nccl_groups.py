"""NCCL's settings of single groups, as far as they go without a GPU: Megatron's own reader."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import get_args

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from moe_train.backend import groups
from moe_train.config.training import GroupName, NcclGroup
from moe_train.errors import ConfigError
from moe_train.parallel.layout import Layout
from moe_train.planner.resolution import resolve_run

GROUPS = get_args(GroupName)
WORDS = ["device=cpu", "experiment=twin", "parallel=single"]


def test_every_name_is_one_that_megatron_asks_for() -> None:
    source = inspect.getsource(parallel_state)
    args = set(re.findall(r"get_nccl_options\(\s*\"(\w+)\"", source))
    assert set(GROUPS) <= args


@pytest.mark.skipif(not hasattr(dist, "ProcessGroupNCCL"), reason="torch is built without NCCL")
def test_the_settings_reach_nccls_options(monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolve_run(
        [*WORDS, "+backend.nccl_groups={ep: {max_ctas: 16, net_name: IB}, tp: {min_ctas: 4}}"], 1
    )
    config, layout = run.config, run.layout
    made = {}

    def initialize(nccl_communicator_config_path: str, **_: object) -> None:
        import yaml

        with open(nccl_communicator_config_path) as stream:
            given = yaml.safe_load(stream)
        made.update({name: parallel_state.get_nccl_options(name, given) for name in GROUPS})

    monkeypatch.setattr(parallel_state, "initialize_model_parallel", initialize)
    monkeypatch.setattr(
        "megatron.core.process_groups_config.ProcessGroupCollection.use_mpu_process_groups",
        lambda: SimpleNamespace(pp=SimpleNamespace(size=lambda: 1)),
    )
    assert isinstance(layout, Layout)
    groups.open_groups(layout, timeout_seconds=60, nccl=config.backend.nccl_groups)
    assert (made["ep"].config.max_ctas, made["ep"].config.net_name) == (16, "IB")
    assert made["tp"].config.min_ctas == 4
    plain = dist.ProcessGroupNCCL.Options()
    assert made["tp"].config.max_ctas == plain.config.max_ctas, "not given, so NCCL's own choice"
    assert all(made[name] is None for name in GROUPS if name not in ("ep", "tp"))


@pytest.mark.parametrize(
    ("given", "field", "word"),
    [
        ("{expp_tp: {max_ctas: 16}}", "expp_tp", "did you mean ep_tp?"),
        ("{ep: {max_ctas: 0}}", "ep.max_ctas", ">= 1 and <= 64"),
        ("{ep: {min_ctas: 9, max_ctas: 8}}", "ep.min_ctas", "at most 8"),
        ("{ep: {net_name: tcp}}", "ep.net_name", "one of IB, socket"),
        ("{ep: {maxctas: 8}}", "ep.maxctas", ""),
    ],
)
def test_what_nccl_would_refuse_is_refused_first(given: str, field: str, word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_run([*WORDS, f"+backend.nccl_groups={given}"], 1)
    assert f"backend.nccl_groups.{field}" in str(refused.value)
    assert word in str(refused.value)


def test_group_settings_are_the_configs_dataclass() -> None:
    config = resolve_run(
        [*WORDS, "+backend.nccl_groups={dp: {is_high_priority_stream: true}}"], 1
    ).config
    assert config.backend.nccl_groups == {"dp": NcclGroup(is_high_priority_stream=True)}
