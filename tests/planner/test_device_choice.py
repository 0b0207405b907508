"""The profile of a device by its name, and the experiment by what the devices hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe_train.cli import main
from moe_train.config.compose import compose, config_dir, group_options
from moe_train.config.hardware import MachineFacts
from moe_train.errors import ConfigError
from moe_train.parallel.resolved import ResolvedRun
from moe_train.planner.estimate import estimate
from moe_train.planner.machine.experiment import CANDIDATES, choose_experiment
from moe_train.planner.machine.profiles import UNKNOWN, profile_of
from moe_train.planner.resolution import resolve_run
from moe_train.run.resolution import resolve_on_devices
from moe_train.train.metrics import device_peak
from tests.support.devices import A100, H100, node, on, outcome, sensible, tables


@pytest.mark.parametrize(
    ("device", "memory_gb", "profile"),
    [
        ("NVIDIA H100 80GB HBM3", 85.5, "h100_80gb"),
        ("NVIDIA H100 PCIe", 85.5, "h100_80gb_pcie"),
        ("NVIDIA H100 NVL", 100.5, "h100_94gb_nvl"),
        ("NVIDIA H100", 68.5, "h100_64gb"),
        ("NVIDIA H200", 150.8, "h200_141gb"),
        ("NVIDIA A100-SXM4-40GB", 42.9, "a100_40gb"),
        ("NVIDIA A100-SXM4-80GB", 85.9, "a100_80gb"),
        ("A100-SXM4-80GB", 85.9, "a100_80gb"),
        ("NVIDIA A100 80GB PCIe", 85.9, "a100_80gb_pcie"),
        ("NVIDIA A100-SXM-64GB", 68.2, "a100_64gb"),
        ("NVIDIA B200", 192.3, "b200_180gb"),
        ("NVIDIA L40S", 48.3, "l40s_48gb"),
        ("NVIDIA GeForce RTX 4090", 25.8, "rtx_4090"),
        ("Tesla V100-SXM2-32GB", 34.4, "v100_32gb"),
        # Of none: another part, a slice of one, one with memory of no part.
        ("NVIDIA A10G", 24.1, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5.1, None),
        ("NVIDIA H100 80GB HBM3", 40.0, None),
        ("NVIDIA H100", 85.5, None),
        ("", 85.5, None),
    ],
)
def test_profiles_by_name(device: str, memory_gb: float, profile: str | None) -> None:
    assert profile_of(device, memory_gb) == profile


def test_a_profile_by_name_of_the_user_wins() -> None:
    seen = tables((8, node(8)))
    named = resolve_on_devices(["hardware=a100_64gb"], seen).config.hardware
    assert (named.name, named.memory_gb, named.device) == ("a100_64gb", 64.0, "")
    part = resolve_on_devices(["hardware.memory_gb=70"], seen).config.hardware
    assert (part.name, part.memory_gb, part.device) == ("h100_80gb", 70.0, H100[0])


def test_an_unknown_gpu_has_no_peak_and_is_told_once() -> None:
    seen = tables((1, node(1, ("NVIDIA Z9", 90.0))))
    plan = resolve_on_devices([], seen)
    assert plan.config.hardware.name == UNKNOWN
    assert not plan.config.hardware.peak_known
    assert [note for note in plan.notes if "no MFU" in note and "Z9" in note]
    assert not any("no MFU" in note for note in resolve_on_devices([], tables((1, node(1)))).notes)


def test_bf16_is_refused_where_the_device_has_none() -> None:
    seen = tables((1, node(1, ("Tesla V100-SXM2-32GB", 34.4))))
    assert resolve_on_devices([], seen).config.dtype == "fp32"
    with pytest.raises(ConfigError, match="v100_32gb has no bf16"):
        resolve_on_devices(["experiment=gpu_1b"], seen)


def test_mfu_is_of_the_device_s_own_profile() -> None:
    h100 = resolve_on_devices(["experiment=twin", "dtype=bf16"], tables((8, node(8)))).config
    assert device_peak(h100) == 989e12
    a100 = resolve_on_devices([], tables((4, node(4, A100)))).config
    assert device_peak(a100) == 312e12
    run = resolve_on_devices([], tables((1, node(1, ("NVIDIA Z9", 90.0)))))
    assert device_peak(run.config) == 0
    report = estimate(run).report()
    assert report["time"]["mfu"] is None and report["hardware"]["device"] == "NVIDIA Z9"
    cpu = resolve_on_devices(["device=cpu"], tables((1, ()))).config
    assert device_peak(cpu) == 1e12 * cpu.hardware.peak_tflops["fp32"]
    # A CPU that runs a plan for GPUs is not measured by them.
    planned = resolve_on_devices(["device=cpu", "hardware=a100_64gb"], tables((1, ()))).config
    assert device_peak(planned) == 0


@pytest.mark.parametrize("memory_gb", [4, 8.6, 17.1, 25.7, 48.3, 68.2, 150.8])
def test_one_gpu_gets_the_largest_model_that_it_holds(memory_gb: float) -> None:
    plan = resolve_on_devices([], tables((1, node(1, ("", memory_gb)))))
    sensible(plan, 1, "cuda")
    largest = {8.6: "gpu_300m", 25.7: "gpu_1b", 68.2: "gpu_3b"}
    want = [name for least, name in largest.items() if memory_gb >= least][-1:] or ["twin"]
    assert plan.config.experiment == want[0]
    assert plan.config.experiment_reason.startswith("auto: 1 device of ")


@pytest.mark.parametrize(
    ("ranks", "layout", "sequences"),
    [(2, "EP2", 32), (3, "ETP3", 36), (4, "EP4", 32), (5, "DP5", 40), (7, "DP7", 28)],
)
def test_a_few_gpus_share_the_batch(ranks: int, layout: str, sequences: int) -> None:
    plan = outcome(tables((ranks, node(ranks))))
    assert isinstance(plan, ResolvedRun)
    assert (plan.layout.tag, plan.config.batch.global_) == (layout, sequences)


def test_a_batch_of_the_user_stands() -> None:
    own = resolve_on_devices(["batch.global=84", "batch.micro=1"], tables((7, node(7))))
    assert own.config.batch.global_ == 84


@pytest.mark.parametrize(
    ("facts", "want"),
    [
        (MachineFacts("cpu", 8, 512.0), "twin"),
        (MachineFacts("gpu", 8, 64.0), "moe_30b_8x64gb"),
        (MachineFacts("gpu", 16, 141.0), "moe_30b_8x64gb"),
        (MachineFacts("gpu", 32, 64.0), "moe_30b_32x64gb"),
        (MachineFacts("gpu", 8, 40.0), "gpu_3b"),
        (MachineFacts("gpu", 8, 12.0), "gpu_300m"),
        (MachineFacts("gpu", 12, 64.0), "gpu_3b"),
    ],
)
def test_experiments_by_memory(facts: MachineFacts, want: str) -> None:
    name, reason = choose_experiment(facts)
    assert name == want and reason
    assert want == "twin" or f"{want} needs" in reason


@pytest.mark.parametrize("memory_gb", [59.0, 59.5, 64.0])
def test_what_is_chosen_is_what_a_plan_fits(memory_gb: float) -> None:
    name, _ = choose_experiment(MachineFacts("gpu", 8, memory_gb))
    run = resolve_run(["experiment=moe_30b_8x64gb", f"hardware.memory_gb={memory_gb}"], 8)
    assert (name == "moe_30b_8x64gb") == estimate(run).fits


def test_candidates_are_shipped() -> None:
    assert set(CANDIDATES) <= set(group_options()["experiment"])
    for name in ("gpu_3b", "gpu_1b", "gpu_300m"):
        config = compose([f"experiment={name}"])
        assert config.dtype == "bf16" and config.optim.precision_aware
        assert not config.data.train, "the embedded corpus"
        assert (config_dir() / "model" / f"{config.model.name}.yaml").is_file()


ROW = re.compile(r"\| (\d+) \| ([0-9.]+) GB \| `(\w+)` \| ([\w.]+) \| (\d+) GB \|")
DEVICES = Path(__file__).resolve().parents[2] / "docs" / "devices.md"


def test_the_documented_choices_are_the_real_ones() -> None:
    rows = ROW.findall(DEVICES.read_text(encoding="utf-8"))
    assert len(rows) > 10
    for ranks, memory_gb, experiment, layout, need in rows:
        world, size = int(ranks), float(memory_gb)
        facts = MachineFacts("gpu", world, size, (("", size),), min(world, 8))
        plan = on(facts, ())
        assert (plan.config.experiment, plan.layout.tag) == (experiment, layout)
        assert f"{experiment} needs {need} GB of each" in plan.config.experiment_reason


def test_every_profile_of_a_device_is_documented() -> None:
    """By the GPU's name, as a reader looks for it."""
    text = DEVICES.read_text(encoding="utf-8")
    for name in group_options()["hardware"]:
        hardware = compose([f"hardware={name}"]).hardware
        if hardware.devices:
            kind = name.split("_")[0].upper() if not name.startswith("rtx") else name[4:]
            assert kind in text, name


def test_a_plan_is_for_what_make_train_would_start_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nfor n in 0 1 2; do echo $n, GPU-$n, {H100[0]}, 81559; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    target = tmp_path / "plan.json"
    assert main(["plan", "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    assert (report["layout"]["world"], report["experiment"]) == (2, "gpu_3b")
    assert report["hardware"]["device"] == H100[0]
    assert main(["plan", "--world", "8", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["experiment"] == "moe_30b_8x64gb"


@pytest.mark.parametrize(
    "option", ["dtype=fp8", "parallel.dispatcher=flex", "parallel.context=2 parallel.pipeline=2"]
)
def test_a_plan_has_the_device_of_its_hardware_profile(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine without GPUs, options of GPUs are planned for a profile that has them."""
    words = ["hardware=h100_80gb", *option.split()]
    for command in ("plan", "schedule"):
        assert main([command, *words]) == 0, capsys.readouterr().err
        assert main([command, "hardware=cpu", *option.split()]) == 2
        assert "GPU" in capsys.readouterr().err


def test_a_plan_refuses_a_dtype_that_its_profile_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("plan", "schedule"):
        assert main([command, "hardware=a100_80gb", "dtype=fp8"]) == 2
        assert "a100_80gb has no fp8" in capsys.readouterr().err
