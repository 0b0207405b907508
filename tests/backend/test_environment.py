"""Environment variables by rule: what is set, why, and who wins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.backend.cuda.environment import set_environment
from moe_train.commands.plan import plan_main
from moe_train.config.environment import ALLOCATORS, CONNECTIONS, EXPANDABLE, variables
from moe_train.config.training import BackendConfig
from moe_train.errors import ConfigFaults
from moe_train.planner.resolution import resolve_run

SPAN = ["parallel.placement=span", "parallel.expert=4"]
SINGLE = ["experiment=twin", "parallel=single", "recompute=none", "dtype=bf16"]
SETTLED = BackendConfig(cuda_device_max_connections=1, expandable_segments=True)


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CONNECTIONS, *ALLOCATORS, "NCCL_NVLS_ENABLE"):
        # Set first, so that what a test writes is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("args", "world", "expected"),
    [
        ([], 1, None),
        (["parallel.pipeline=2"], 2, None),
        (["parallel.expert=2"], 2, None),
        (["parallel.tensor=2"], 2, 1),
        (["parallel.context=2", "hardware=h100_80gb"], 2, 1),
        (["parallel.tensor=2", "parallel.pipeline=2", *SPAN], 4, 1),
        (["parallel.expert=2", "parallel.overlap_expert_comm=true"], 2, 32),
        # Megatron leaves the choice open; the overlap was asked for.
        (["parallel.tensor=2", "parallel.expert=2", "parallel.overlap_expert_comm=true"], 2, 32),
        (
            ["parallel.tensor=2", "parallel.pipeline=2", *SPAN]
            + ["parallel.overlap_expert_comm=true"],
            4,
            32,
        ),
        (["parallel.tensor=2", "backend.cuda_device_max_connections=8"], 2, 8),
        (["backend.cuda_device_max_connections=2"], 1, 2),
    ],
)
def test_connections_follow_the_layout(args: list[str], world: int, expected: int | None) -> None:
    config = resolve_run([*SINGLE, *args], world).config
    assert config.backend.cuda_device_max_connections == expected
    output = variables(config)[0]
    assert output.value == (None if expected is None else str(expected))
    explicit = any("cuda_device_max_connections" in word for word in args)
    assert ("set in the config" in output.why) == explicit


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], True),
        (["backend.expandable_segments=false"], False),
        (["+megatron.ddp.nccl_ub=true"], False),
        (["+megatron.transformer.cuda_graph_impl=local"], False),
        (["+megatron.transformer.cuda_graph_impl=local", "backend.expandable_segments=true"], True),
    ],
)
def test_segments_grow_unless_something_forbids_it(args: list[str], expected: bool) -> None:
    config = resolve_run([*SINGLE, *args], 1).config
    assert config.backend.expandable_segments is expected
    set_environment(config.backend)
    values = {one.name: one.value for one in variables(config)}
    assert [values[name] for name in ALLOCATORS] == [EXPANDABLE if expected else None] * 2


def test_segments_and_user_buffers_exclude_each_other() -> None:
    with pytest.raises(ConfigFaults, match="nccl_ub"):
        resolve_run([*SINGLE, "+megatron.ddp.nccl_ub=true", "backend.expandable_segments=true"], 1)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_an_allocator_setting_of_the_environment_is_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other name as well: torch would read its two configurations from two variables."""
    import os

    monkeypatch.setenv(name, "max_split_size_mb:512")
    (note,) = set_environment(SETTLED)
    assert name in note and "is kept" in note
    assert {one: os.environ.get(one) for one in ALLOCATORS} == {
        **dict.fromkeys(ALLOCATORS), name: "max_split_size_mb:512"
    }  # fmt: skip
    assert os.environ[CONNECTIONS] == "1"


def test_the_config_replaces_connections_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import os

    monkeypatch.setenv(CONNECTIONS, "8")
    (note,) = set_environment(SETTLED)
    assert os.environ[CONNECTIONS] == "1" and f"{CONNECTIONS}=8" in note
    assert [os.environ[name] for name in ALLOCATORS] == [EXPANDABLE] * 2
    assert set_environment(SETTLED) == [], "a run that opens finds its own"
    assert set_environment(BackendConfig(expandable_segments=False)) == [
        f"{name}={EXPANDABLE} of the environment is kept; "
        "backend.expandable_segments is not applied"
        for name in ALLOCATORS
    ]
    assert os.environ[CONNECTIONS] == "1", "nothing to set, so left as it is"


def test_torch_reads_both_names() -> None:
    """The installed torch, whichever it is: its own libraries name the variables."""
    import torch

    library = Path(torch.__file__).parent / "lib"
    core = (library / "libc10.so").read_bytes()
    assert all(name.encode() in core for name in ALLOCATORS)
    if (library / "libc10_cuda.so").exists():
        assert ALLOCATORS[1].encode() in (library / "libc10_cuda.so").read_bytes()


def test_the_plan_shows_every_variable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    overrides = ["experiment=moe_30b_8x64gb", "+backend.nccl={NVLS_ENABLE: 0}"]
    assert plan_main([*overrides, "--full", "--json", str(path)]) == 0
    result = {one["name"]: one for one in json.loads(path.read_text())["environment"]}
    assert result[CONNECTIONS]["value"] == "1" and "tensor" in result[CONNECTIONS]["why"]
    assert result["NCCL_NVLS_ENABLE"]["value"] == "0"
    shown = capsys.readouterr().out
    assert all(f"{name}" in shown for name in result)
