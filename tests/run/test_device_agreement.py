"""Ranks that see different GPUs, or read different config files, are refused together."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_train.config import compose
from moe_train.errors import EXIT_CONFIG, EXIT_FINISHED, EXIT_HUNG
from moe_train.planner.resolution import resolve_run
from moe_train.run.resolution import compare_outcomes, first_difference
from moe_train.testing.world import run_world

pytestmark = pytest.mark.world

OVERRIDES = ["log.wandb=disabled", "log.console=none", "experiment=single", "parallel=auto",
         "train.steps=1", "train.eval_every=0", "checkpoint.every=0"]  # fmt: skip
LINE = "NVIDIA H100 80GB HBM3, 81559"


def driver(folder: Path, gpus: int) -> str:
    """A PATH whose nvidia-smi lists some GPUs."""
    program = folder / "nvidia-smi"
    lines = "".join(f"echo '{n}, GPU-{n}, {LINE}'\n" for n in range(gpus))
    program.write_text(f"#!/bin/sh\n{lines}")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def _start(
    rank: int,
    world: int,
    overrides: list[str],
    variables: list[dict[str, str]],
    configs: dict[int, Path],
) -> tuple[int, bool]:
    """Exit code of a rank, and whether it ever had a process group."""
    import torch.distributed as dist

    from moe_train.run.main import main

    opened: list[int] = []
    init = dist.init_process_group

    def noted(*args: object, **options: object) -> None:
        opened.append(1)
        init(*args, **options)  # type: ignore[arg-type]

    dist.init_process_group = noted  # type: ignore[assignment]
    os.environ.update(variables[rank])
    if rank in configs:
        compose.config_dir = lambda: configs[rank]
    return main(overrides), bool(opened)


def start(
    folder: Path,
    variables: list[dict[str, str]],
    *overrides: str,
    configs: dict[int, Path] | None = None,
) -> tuple[list[int], str]:
    """Exit codes and output of a world that is to be refused without a group or a folder.

    Args:
        configs: the folder of config files of ranks that have one of their own.
    """
    log = folder / "log"
    run = [*OVERRIDES, f"run.dir={folder / 'runs'}", *overrides]
    ended = run_world(_start, len(variables), run, variables, configs or {}, timeout=120.0, log=log)
    if all(code == EXIT_CONFIG for code, _ in ended):
        assert not any(opened for _, opened in ended), "refused before process groups exist"
        assert not (folder / "runs").exists()
    return [code for code, _ in ended], log.read_text()


def nodes(path: str, *shown: str) -> list[dict[str, str]]:
    """Two ranks a node, each with what its node shows of the driver's GPUs."""
    return [
        {"PATH": path, "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": "2",
         "CUDA_VISIBLE_DEVICES": visible}
        for visible in shown for local in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (("0,1", ""), "node 1 (ranks 2-3) has no GPU"),
        (("0", "2,3"), "node 0 (ranks 0-1) has 1 GPU for 2 ranks"),
    ],
)
def test_a_node_that_differs_is_refused_on_all_ranks(
    tmp_path: Path, shown: tuple[str, str], message: str
) -> None:
    codes, lines = start(tmp_path, nodes(driver(tmp_path, 4), *shown))
    assert codes == [EXIT_CONFIG] * 4, lines
    assert lines.count("moe_train: ") == 1 and message in lines, lines
    assert "device=cpu" in lines and "Traceback" not in lines


def test_gpus_that_torch_cannot_use_are_refused_and_not_replaced(tmp_path: Path) -> None:
    """The driver lists them; this torch finds no driver, or is built without CUDA."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch can use a GPU here")
    codes, lines = start(tmp_path, nodes(driver(tmp_path, 4), "0,1", "2,3"))
    assert codes == [EXIT_CONFIG] * 4, lines
    assert lines.count("torch shows 0 usable GPU(s): ") == 1, lines


def test_a_rank_with_another_config_file_is_refused_by_key(tmp_path: Path) -> None:
    """As on a node whose copy of the package is older."""
    shutil.copytree(compose.config_dir(), tmp_path / "older")
    file = tmp_path / "older" / "experiment" / "single.yaml"
    file.write_text(file.read_text().replace("lr: 3e-3", "lr: 4e-3"))
    variables: list[dict[str, str]] = [{}, {}, {}]
    codes, lines = start(tmp_path, variables, "device=cpu", configs={2: tmp_path / "older"})
    assert codes == [EXIT_CONFIG] * 3, lines
    assert lines.count("moe_train: ") == 1 and "rank 2: its config differs" in lines, lines
    assert lines.count("optim.lr is 0.004 there and 0.003 on rank 0") == 1, lines


def test_digests_differ_exactly_where_the_runs_do() -> None:
    overrides = ["experiment=single", "device=cpu"]
    run, same, other = (
        resolve_run([*overrides, *more], 1) for more in ([], [], ["model.heads=4", "run.seed=7"])
    )
    assert run == same and run.digest == same.digest != other.digest
    assert run.with_name("x").digest != run.digest, "every key counts"
    [[field, problem, _]] = first_difference(
        [run.to_mapping(), same.to_mapping(), other.to_mapping()]
    )
    assert field == "rank 2" and "run.seed is 7 there and" in problem and "model.heads" in problem


def test_a_difference_of_number_types_is_named_and_any_other_refused() -> None:
    """Untyped values of ``megatron.*`` may be of any type; the digest tells 1 from 1.0."""
    values: list[Any] = [1, 1.0, True]
    for ours, theirs in itertools.permutations(values, 2):
        [[field, problem, fix]] = first_difference(
            [{"megatron": {"key": value}} for value in (ours, theirs)]
        )
        assert field == "rank 1" and "same overrides" in fix
        assert f"megatron.key is {theirs!r} there and {ours!r} on rank 0" in problem
    [[field, problem, fix]] = first_difference([{}, {"key": None}])
    assert field == "config" and "differs between ranks" in problem and "same overrides" in fix


def test_faults_of_one_rank_name_it_and_shared_ones_do_not() -> None:
    fault = ["device", "no GPU", "repair it"]
    assert compare_outcomes([([], "a"), ([], "a")]) == ([], True)
    assert compare_outcomes([([], "a"), ([], "b")]) == ([], False)
    assert compare_outcomes([([fault], ""), ([fault], "")])[0] == [fault]
    [[_, problem, _]] = compare_outcomes([([], "a"), ([fault], "")])[0]
    assert problem == "rank 1: no GPU"


def test_cpus_agree_and_train(tmp_path: Path) -> None:
    """Two nodes, neither of which has a GPU, though both have a driver."""
    (tmp_path / "bin").mkdir()
    codes, lines = start(tmp_path, nodes(driver(tmp_path / "bin", 0), "", ""))
    assert codes == [EXIT_FINISHED] * 4, lines


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    alone = run_world(_alone, 1, [*OVERRIDES, f"run.dir={tmp_path}", "device=cpu"], timeout=120.0)
    assert alone == [EXIT_HUNG]


def _alone(rank: int, world: int, overrides: list[str]) -> int:
    from moe_train.run.main import main

    os.environ["WORLD_SIZE"] = "2"
    return main([*overrides, "backend.timeout_seconds=1"])
