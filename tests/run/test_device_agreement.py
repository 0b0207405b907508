"""Real ranks that see different GPUs, or have different configs, are refused together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_train.errors import EXIT_CONFIG, EXIT_FINISHED, EXIT_HUNG
from moe_train.testing.world import run_world

pytestmark = pytest.mark.world

WORDS = ["log.wandb=disabled", "log.console=none", "experiment=single", "parallel=auto",
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
    rank: int, world: int, words: list[str], variables: list[dict[str, str]], own: list[list[str]]
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
    return main([*words, *(own[rank] if own else [])]), bool(opened)


def start(
    folder: Path,
    variables: list[dict[str, str]],
    own: list[list[str]] | None = None,
    *words: str,
) -> tuple[list[int], str]:
    """Exit codes and output of a world that is to be refused without a group or a folder."""
    log = folder / "log"
    run = [*WORDS, f"run.dir={folder / 'runs'}", *words]
    ended = run_world(_start, len(variables), run, variables, own, timeout=120.0, log=log)
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
    ("shown", "told"),
    [
        (("0,1", ""), "node 1 (ranks 2-3) has no GPU"),
        (("0", "2,3"), "node 0 (ranks 0-1) has 1 GPU for 2 ranks"),
    ],
)
def test_a_node_that_differs_is_refused_on_all_ranks(
    tmp_path: Path, shown: tuple[str, str], told: str
) -> None:
    codes, said = start(tmp_path, nodes(driver(tmp_path, 4), *shown))
    assert codes == [EXIT_CONFIG] * 4, said
    assert said.count("moe_train: ") == 1 and told in said, said
    assert "device=cpu" in said and "Traceback" not in said


def test_gpus_that_torch_cannot_use_are_refused_and_not_replaced(tmp_path: Path) -> None:
    """The driver lists them; this torch finds no driver, or is built without CUDA."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch can use a GPU here")
    codes, said = start(tmp_path, nodes(driver(tmp_path, 4), "0,1", "2,3"))
    assert codes == [EXIT_CONFIG] * 4, said
    assert said.count("torch shows 0 usable GPU(s): ") == 1, said


def test_ranks_with_other_configs_are_refused_by_key(tmp_path: Path) -> None:
    variables: list[dict[str, str]] = [{}, {}, {}]
    own = [["optim.lr=0.1"], ["optim.lr=0.1"], ["optim.lr=0.2"]]
    codes, said = start(tmp_path, variables, own, "device=cpu")
    assert codes == [EXIT_CONFIG] * 3, said
    assert "rank 2: its config differs" in said
    assert said.count("optim.lr is 0.2 there and 0.1 on rank 0") == 1, said


def test_cpus_agree_and_train(tmp_path: Path) -> None:
    """Two nodes, neither of which has a GPU, though both have a driver."""
    (tmp_path / "bin").mkdir()
    codes, said = start(tmp_path, nodes(driver(tmp_path / "bin", 0), "", ""))
    assert codes == [EXIT_FINISHED] * 4, said


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    alone = run_world(_alone, 1, [*WORDS, f"run.dir={tmp_path}", "device=cpu"], timeout=120.0)
    assert alone == [EXIT_HUNG]


def _alone(rank: int, world: int, words: list[str]) -> int:
    from moe_train.run.main import main

    os.environ["WORLD_SIZE"] = "2"
    return main([*words, "backend.timeout_seconds=1"])
