"""A run whose plan does not fit the GPUs that are there is refused before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train import runtime
from moe_train.cli import main
from moe_train.config import kernels
from moe_train.config.experiment import MachineFacts
from moe_train.errors import EXIT_CONFIG, ConfigError, ConfigFaults
from moe_train.plan import prepare as preparing

ROOT = Path(__file__).resolve().parent.parent
PLAIN = [
    "experiment=moe_30b_8x64gb",
    "optim.distributed=false",
    "optim.precision_aware=false",
    "optim.moment_dtype=fp32",
    "optim.grad_dtype=fp32",
]
PRECISION = ["experiment=moe_30b_8x64gb"]


def on(monkeypatch: pytest.MonkeyPatch, kind: str, memory_gb: float) -> None:
    monkeypatch.setattr(runtime, "visible_devices", lambda n: MachineFacts(kind, n, memory_gb))


def smi(folder: Path, mebibytes: int) -> dict[str, str]:
    """An environment whose nvidia-smi lists eight devices."""
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\nfor i in 1 2 3 4 5 6 7 8; do echo " + str(mebibytes) + "; done\n"
    )
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("rank", [0, 5])
def test_every_rank_leaves_with_2_before_torch_and_rank_0_says_why(
    tmp_path: Path, rank: int
) -> None:
    ranks = {"RANK": str(rank), "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    code = (
        "import sys; from moe_train.runtime import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *PLAIN, f"run.dir={tmp_path}/runs"],
        cwd=ROOT,
        env=smi(tmp_path, 61035) | ranks,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert ("optim=precision_aware" in done.stderr) == (rank == 0)
    assert not (tmp_path / "runs").exists()


def test_the_same_model_starts_with_the_precision_aware_optimizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(monkeypatch, "gpu", 64.0)
    assert runtime.planned(PRECISION, 8)[1].world == 8
    with pytest.raises(ConfigError, match="memory: stage 0 needs 7"):
        runtime.planned(PLAIN, 8)
    # A larger device takes both, whatever profile the plan is made with.
    on(monkeypatch, "gpu", 80.0)
    assert runtime.planned(PLAIN, 8)[0].hardware.memory_gb == 64.0


def test_what_megatron_is_told_directly_is_the_users_to_judge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on(monkeypatch, "gpu", 64.0)
    runtime.planned([*PLAIN, "megatron.transformer.fp8_param=false"], 8)
    told = capsys.readouterr().out
    assert "warning: memory" in told
    assert "megatron.transformer.fp8_param" in told


def test_a_cpu_is_never_refused_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "cpu", 0.0)
    assert runtime.planned([], 8)[0].experiment == "twin"
    assert runtime.planned([*PLAIN, "device=cpu"], 8)[1].world == 8


def test_the_twin_fits_a_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "gpu", 8.0)
    assert runtime.planned([], 8)[0].experiment == "twin"


@pytest.mark.parametrize("word", ["dtype=fp8", "parallel.context=2", "parallel.dispatcher=flex"])
def test_a_machine_without_gpus_refuses_what_only_gpus_do(
    monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    on(monkeypatch, "cpu", 0.0)
    monkeypatch.setattr(preparing, "accelerator_present", lambda: False)
    words = ["experiment=single", word]
    with pytest.raises(ConfigFaults) as refused:
        runtime.planned(words, 2)
    assert word.partition("=")[0] in {fault.field for fault in refused.value.faults}
    with pytest.raises(ConfigFaults) as refused:
        runtime.planned([*words, "device=cpu"], 2)
    assert word.partition("=")[0] in {fault.field for fault in refused.value.faults}


def test_the_plan_says_what_a_parameter_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """So that a reader sees where 18, 12 and the figure without an optimizer come from."""
    assert main(["plan", *PRECISION]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 weight + 4 gradient + 4 master + 8 moments = 18" in told
    assert "2 weight + 2 gradient + 4 master + 4 moments = 12" in told
    assert "without an optimizer are weights, gradients and activations" in told


def test_a_plan_for_hardware_without_the_dtype_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", *PRECISION, "dtype=fp8"]) == EXIT_CONFIG
    assert "a100_64gb has no fp8" in capsys.readouterr().err
    assert main(["plan", *PRECISION, "dtype=fp8", "hardware=h100_64gb"]) == 0


@pytest.mark.parametrize("installed", [True, False])
def test_a_run_plans_with_the_kernels_that_are_here(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """fp8 is TransformerEngine's: without it a run is refused before anything is started."""
    on(monkeypatch, "gpu", 64.0)
    monkeypatch.setattr(kernels, "transformer_engine_installed", lambda: installed)
    words = ["experiment=twin", "dtype=fp8", "model.expert_hidden=64", "parallel=single"]
    words += ["model.hidden=64", "data.sequence=128"]
    facts = MachineFacts("gpu", 1, 64.0)
    if installed:
        preparing.prepare(words, 1, facts)
        return
    with pytest.raises(ConfigFaults, match="fp8 needs TransformerEngine"):
        preparing.prepare(words, 1, facts)


def test_the_plan_shows_the_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    words = ["experiment=moe_30b_8x64gb", "--json", str(target)]
    assert main(["plan", *words, "backend.kernels=torch"]) == 0
    assert "Kernels: torch (backend.kernels=torch)" in capsys.readouterr().out
    ours = json.loads(target.read_text())["kernels"]
    assert main(["plan", *words, "backend.kernels=te"]) == 0
    theirs = json.loads(target.read_text())["kernels"]
    assert (ours["name"], theirs["name"]) == ("torch", "te")
    assert ours["settings"]["moe_permute_fusion"]["value"] is False
    assert theirs["settings"]["moe_permute_fusion"]["value"] is True
