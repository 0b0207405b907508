"""A run whose plan does not fit the GPUs that are there is refused before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.backend.cuda.devices import Gpu
from moe_train.cli import main
from moe_train.config import kernels
from moe_train.errors import EXIT_CONFIG, ConfigError, ConfigFaults
from moe_train.planner.machine.devices import Place, RankTable
from moe_train.run.resolution import resolve_on_devices

ROOT = Path(__file__).resolve().parents[2]
PLAIN = [
    "experiment=moe_30b_8x64gb",
    "optim.distributed=false",
    "optim.precision_aware=false",
    "optim.moment_dtype=fp32",
    "optim.grad_dtype=fp32",
]
PRECISION = ["experiment=moe_30b_8x64gb"]


def seen(world: int, memory_gb: float, name: str = "") -> list[RankTable]:
    """Tables of one node's ranks, each with a GPU of its own; none of 0 GB."""
    gpus = tuple(Gpu(f"GPU-{n}", name, memory_gb) for n in range(world)) if memory_gb else ()
    return [RankTable(Place(rank, world, rank, world), gpus) for rank in range(world)]


def smi(folder: Path, mebibytes: int) -> dict[str, str]:
    """An environment whose nvidia-smi lists eight devices."""
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\nfor i in 1 2 3 4 5 6 7 8; do echo " + str(mebibytes) + "; done\n"
    )
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_one_rank_is_refused_before_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from moe_train.run.main import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    small = [*PLAIN, "parallel=single", "recompute=none"]
    done = subprocess.run(
        [sys.executable, "-c", code, *small, f"run.dir={tmp_path}/runs"],
        cwd=ROOT,
        env=smi(tmp_path, 61035),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert "memory: stage 0 needs" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_same_model_starts_with_the_precision_aware_optimizer() -> None:
    assert resolve_on_devices(PRECISION, seen(8, 64.0)).layout.world == 8
    with pytest.raises(ConfigError, match="memory: stage 0 needs 7"):
        resolve_on_devices(PLAIN, seen(8, 64.0))
    # A larger device takes both, whatever profile the user plans with.
    plan = resolve_on_devices([*PLAIN, "hardware=a100_64gb"], seen(8, 80.0))
    assert plan.config.hardware.memory_gb == 64.0


def test_what_megatron_is_told_directly_is_the_users_to_judge() -> None:
    plan = resolve_on_devices([*PLAIN, "megatron.transformer.fp8_param=false"], seen(8, 64.0))
    warning = next(note for note in plan.notes if note.startswith("memory"))
    assert "do not price megatron.transformer.fp8_param" in warning


def test_a_run_names_a_layout_that_beats_its_own() -> None:
    """Pasted behind the overrides, nothing is left to name."""
    gpus = seen(8, 64.0, "NVIDIA A100-SXM-64GB")
    run = resolve_on_devices(PRECISION, gpus)
    [note] = [one for one in run.notes if "is predicted to take" in one]
    better = note.split(": ", 1)[1].split()
    again = resolve_on_devices([*PRECISION, *better], gpus)
    assert again.layout.tag == note.split()[0]
    assert not any("is predicted to take" in one for one in again.notes)


def test_a_cpu_is_never_refused_for_memory() -> None:
    assert resolve_on_devices([], seen(8, 0.0)).config.experiment == "twin"
    assert resolve_on_devices([*PLAIN, "device=cpu"], seen(8, 0.0)).layout.world == 8


def test_the_twin_fits_a_small_gpu() -> None:
    assert resolve_on_devices([], seen(8, 3.0)).config.experiment == "twin"


@pytest.mark.parametrize("word", ["dtype=fp8", "parallel.context=2", "parallel.dispatcher=flex"])
def test_a_machine_without_gpus_refuses_what_only_gpus_do(word: str) -> None:
    overrides = ["experiment=single", word]
    for args in (overrides, [*overrides, "device=cpu"]):
        with pytest.raises(ConfigFaults) as refused:
            resolve_on_devices(args, seen(2, 0.0))
        assert word.partition("=")[0] in {fault.field for fault in refused.value.faults}


def test_the_plan_says_what_a_parameter_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """So that a reader sees where 18, 12 and the figure without an optimizer come from."""
    assert main(["plan", *PRECISION, "--full"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "2 weight + 4 gradient + 4 master + 8 moments = 18" in output
    assert "2 weight + 2 gradient + 4 master + 4 moments = 12" in output
    assert "without an optimizer are weights, gradients and activations" in output


def test_a_plan_for_hardware_without_the_dtype_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [*PRECISION, "parallel.placement=stage", "dtype=fp8"]
    assert main(["plan", *overrides]) == EXIT_CONFIG
    assert "a100_64gb has no fp8" in capsys.readouterr().err
    assert main(["plan", *overrides, "hardware=h100_64gb"]) == 0


@pytest.mark.parametrize("installed", [True, False])
def test_a_run_plans_with_the_kernels_that_are_here(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """fp8 is TransformerEngine's: without it a run is refused before anything is started."""
    monkeypatch.setattr(kernels, "transformer_engine_installed", lambda: installed)
    overrides = ["experiment=twin", "dtype=fp8", "model.expert_hidden=64", "parallel=single"]
    overrides += ["model.hidden=64", "data.sequence=128"]
    if installed:
        resolve_on_devices(overrides, seen(1, 64.0))
        return
    with pytest.raises(ConfigFaults, match="fp8 needs TransformerEngine"):
        resolve_on_devices(overrides, seen(1, 64.0))


def test_the_plan_shows_the_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    overrides = ["experiment=moe_30b_8x64gb", "--json", str(target)]
    assert main(["plan", *overrides, "--full", "backend.kernels=torch"]) == 0
    assert "Kernels: torch (backend.kernels=torch)" in capsys.readouterr().out
    ours = json.loads(target.read_text())["kernels"]
    assert main(["plan", *overrides, "backend.kernels=te"]) == 0
    theirs = json.loads(target.read_text())["kernels"]
    assert (ours["name"], theirs["name"]) == ("torch", "te")
    assert ours["settings"]["moe_permute_fusion"]["value"] is False
    assert theirs["settings"]["moe_permute_fusion"]["value"] is True
