"""Device, experiment, profile and layout are one answer for all ranks, or one refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.backend import select
from moe_train.backend.cuda.devices import Devices, Gpu, parse_table, read_devices, visible
from moe_train.backend.cuda.probe import disagreement
from moe_train.config import kernels as kernel_sets
from moe_train.errors import ConfigError
from moe_train.parallel.resolved import ResolvedRun
from moe_train.planner.estimate import estimate
from moe_train.planner.machine.devices import Place, decide_device
from moe_train.planner.machine.profiles import UNKNOWN
from moe_train.run.resolution import _unusable, resolve_on_devices
from tests.support.devices import A100, H100, RTX, node, outcome, sensible, tables

GPUS = (0, 1, 2, 4, 7, 8)
RANKS = range(1, 17)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("gpus", GPUS)
def test_one_node(gpus: int, ranks: int) -> None:
    result = outcome(tables((ranks, node(gpus))))
    if 0 < gpus < ranks:
        assert isinstance(result, str)
        assert f"has {gpus} GPU" in result and f"for {ranks} ranks" in result
        assert f"--nproc-per-node {gpus}" in result and "device=cpu" in result
        return
    assert isinstance(result, ResolvedRun), result
    sensible(result, ranks, "cuda" if gpus else "cpu")
    config = result.config
    if not gpus:
        assert (config.experiment, config.hardware.name) == ("twin", "cpu")
        return
    assert config.dtype == "bf16"
    assert config.experiment == ("moe_30b_8x64gb" if ranks == 8 else "gpu_3b")
    assert config.hardware.name == "h100_80gb"
    assert (config.hardware.device, config.hardware.memory_gb) == H100


@pytest.mark.parametrize("ranks", RANKS)
def test_a_cpu_is_had_by_asking_on_any_machine(ranks: int) -> None:
    want = decide_device("auto", tables((ranks, ())))
    for gpus in GPUS:
        assert decide_device("cpu", tables((ranks, node(gpus)))) == want


def test_cuda_by_name_is_refused_without_a_gpu_on_any_node() -> None:
    result = outcome(tables((2, ())), "device=cuda")
    assert isinstance(result, str) and "shows no usable GPU" in result
    assert isinstance(outcome(tables((2, node(2)), (2, ())), "device=cuda"), str)
    sensible(resolve_on_devices(["device=cuda"], tables((2, node(2)))), 2, "cuda")


@pytest.mark.parametrize("first", GPUS)
@pytest.mark.parametrize("second", GPUS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_two_nodes(first: int, second: int, ranks: int) -> None:
    result = outcome(tables((ranks, node(first)), (ranks, node(second, name="b"))))
    if first == second == 0:
        assert isinstance(result, ResolvedRun)
        sensible(result, 2 * ranks, "cpu")
    elif min(first, second) >= ranks:
        assert isinstance(result, ResolvedRun), result
        sensible(result, 2 * ranks, "cuda")
        assert result.config.hardware.devices_per_node == ranks
    else:
        assert isinstance(result, str)
        for number, gpus in enumerate((first, second)):
            assert (f"node {number} " in result) == (gpus < ranks)
        assert "device=cpu" in result


def test_nodes_of_different_kinds_go_by_the_weaker() -> None:
    for order in ((H100, A100), (A100, H100)):
        seen = tables((4, node(4, order[0])), (4, node(4, order[1], "b")))
        result = resolve_on_devices([], seen)
        hardware = result.config.hardware
        assert (hardware.name, hardware.memory_gb) == ("a100_64gb", A100[1])
        assert any("different kinds" in note for note in result.notes)
        assert any("68.2 to 85.5 GB" in note for note in result.notes)
    # One of them unknown: nothing is known of the run.
    seen = tables((4, node(4)), (4, node(4, ("NVIDIA Z9", 90.0), "b")))
    assert resolve_on_devices([], seen).config.hardware.name == UNKNOWN


def test_the_smallest_memory_decides() -> None:
    large, small = ("", 85.0), ("", 40.0)
    alike = resolve_on_devices([], tables((8, node(8, large))))
    mixed = resolve_on_devices([], tables((8, (*node(7, large), Gpu("GPU-b", *small)))))
    assert alike.config.experiment == "moe_30b_8x64gb"
    assert mixed.config.experiment == "gpu_3b"
    assert mixed.config.hardware.memory_gb == 40.0


def test_ranks_that_the_launcher_shows_one_gpu_each() -> None:
    gpus = node(4)
    seen = [replace(table, gpus=(gpus[n],)) for n, table in enumerate(tables((4, gpus)))]
    sensible(resolve_on_devices([], seen), 4, "cuda")
    seen[3] = replace(seen[3], gpus=(gpus[0],))
    result = outcome(seen)
    assert isinstance(result, str) and "different GPUs" in result
    seen[3] = replace(seen[3], gpus=())
    result = outcome(seen)
    assert isinstance(result, str) and "rank 3 sees none" in result


def test_idle_gpus_and_doubts_are_told() -> None:
    notes = resolve_on_devices([], tables((1, node(8)))).notes
    assert any("7 GPUs" in note for note in notes)
    seen = [replace(table, problem="nvidia-smi failed: x") for table in tables((2, ()))]
    assert resolve_on_devices([], seen).notes == ("training on the CPU: nvidia-smi failed: x",)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 8), st.integers(0, 8), st.sampled_from([H100, A100, RTX])),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["auto", "cpu", "cuda"]),
)
def test_no_rank_falls_back_alone(
    nodes: list[tuple[int, int, tuple[str, float]]], wanted: str
) -> None:
    seen = tables(
        *((ranks, node(gpus, kind, f"{n}-")) for n, (ranks, gpus, kind) in enumerate(nodes))
    )
    enough = all(gpus >= ranks for ranks, gpus, _ in nodes)
    none = not any(gpus for _, gpus, _ in nodes)
    try:
        facts = decide_device(wanted, seen)
    except ConfigError as refused:
        assert refused.field == "device" and refused.fix
        assert wanted != "cpu" and not enough and not (none and wanted == "auto")
        return
    assert facts.count == len(seen)
    assert facts.kind == ("cpu" if wanted == "cpu" or none else "gpu")
    if facts.kind == "gpu":
        assert enough
        assert facts.memory_gb == min(kind[1] for _, _, kind in nodes)
    assert decide_device(wanted, list(reversed(seen))) == facts, "the order of arrival decides"


TORCH_ENTRIES = st.sampled_from(
    ["0", "1", "2", "3", "7", "-1", "", " 1", "2x", "x2", "+1", "GPU-a", "GPU-ab", "GPU-b",
     "GPU-c1", "GPU-", "MIG-1", "00"]
)  # fmt: skip
UUIDS = ["GPU-ab12", "GPU-ac34", "GPU-b56", "GPU-c1"]


@settings(max_examples=400, deadline=None)
@given(st.lists(TORCH_ENTRIES, max_size=5))
def test_visible_devices_are_torchs(entries: list[str]) -> None:
    """torch.cuda's own reading of CUDA_VISIBLE_DEVICES, given the same list of devices."""
    import torch

    text = ",".join(entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", text)
        theirs = torch.cuda._parse_visible_devices()
    if text.startswith("MIG-"):
        return
    if theirs and isinstance(theirs[0], str):
        theirs = torch.cuda._transform_uuid_to_ordinals(theirs, UUIDS)
    else:
        for place, index in enumerate(theirs):
            if index >= len(UUIDS):
                theirs = theirs[:place]
                break
    assert visible(UUIDS, text) == list(theirs)


def test_no_variable_shows_all() -> None:
    assert visible(UUIDS, None) == [0, 1, 2, 3]
    assert visible(UUIDS, "") == []


def smi(folder: Path, body: str) -> dict[str, str]:
    """An environment with a stand-in for nvidia-smi."""
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


LINES = "\n".join(f"{n}, GPU-{n}, {H100[0]}, 81559" for n in range(4))


def test_the_driver_s_table(tmp_path: Path) -> None:
    shown = smi(tmp_path / "four", f"cat <<END\n{LINES}\nEND")
    result = read_devices(shown, tmp_path)
    assert [gpu.uuid for gpu in result.gpus] == ["GPU-0", "GPU-1", "GPU-2", "GPU-3"]
    assert result.gpus[0].memory_gb == pytest.approx(85.5, abs=0.1)
    chosen = read_devices({**shown, "CUDA_VISIBLE_DEVICES": "GPU-3,GPU-1"}, tmp_path)
    assert [gpu.uuid for gpu in chosen.gpus] == ["GPU-3", "GPU-1"]
    assert not read_devices({**shown, "CUDA_VISIBLE_DEVICES": ""}, tmp_path).gpus
    slice_ = read_devices({**shown, "CUDA_VISIBLE_DEVICES": "MIG-1"}, tmp_path)
    assert not slice_.complete and "MIG" in slice_.problem


@pytest.mark.parametrize(
    ("wanted", "shown", "warning"),
    [
        ("9", 0, "CUDA_VISIBLE_DEVICES=9 shows 0 of this machine's 4 GPUs"),
        ("GPU-xyz", 0, "shows 0 of"),
        ("0,0", 0, "shows 0 of"),
        ("3,1,9,2", 2, "shows 2 of"),
        ("", 0, ""),
        ("-1", 0, ""),
        ("2,-1,3", 1, ""),
        ("1,0", 2, ""),
    ],
)
def test_entries_that_name_no_gpu_are_reported(
    tmp_path: Path, wanted: str, shown: int, warning: str
) -> None:
    machine = smi(tmp_path / "four", f"cat <<END\n{LINES}\nEND")
    result = read_devices({**machine, "CUDA_VISIBLE_DEVICES": wanted}, tmp_path)
    assert result.complete and len(result.gpus) == shown
    assert warning in result.problem and bool(warning) == bool(result.problem)
    if shown and warning:
        seen = [replace(table, problem=result.problem) for table in tables((1, result.gpus))]
        assert any(warning in note for note in resolve_on_devices([], seen).notes)


@pytest.mark.parametrize(
    ("count", "memory", "warning"),
    [(4, 85.0e9, ""), (5, 84.0e9, ""), (1, 85.0e9, "torch shows 1"), (4, 21.0e9, "one of 21.0 GB")],
)
def test_torch_has_to_see_what_the_plan_was_made_from(
    monkeypatch: pytest.MonkeyPatch, count: int, memory: float, warning: str
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory)
    )
    listed = Devices(tuple(parse_table(LINES)))
    result = disagreement(torch.device("cuda", 3), listed)
    assert warning in result and bool(warning) == bool(result)


def test_a_gpu_that_cannot_be_taken_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's own errors are no ConfigError, and the peers wait for this rank's answer."""
    plan = resolve_on_devices([], tables((1, tuple(parse_table(LINES)))))

    def prepare() -> None:
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(
        select, "select_backend", lambda *_: SimpleNamespace(prepare=prepare, device=None)
    )
    refusal = _unusable(plan.config, Place(0, 1, 0, 1), Devices())
    assert refusal is not None and "cannot take its GPU: CUDA error: out of memory" in str(refusal)
    assert "more" not in str(refusal) and isinstance(refusal.__cause__, RuntimeError)


def test_a_plan_prices_the_kernels_that_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tables((1, tuple(parse_table(LINES))[:1]))
    need = {}
    for kernels, installed in (("te", False), ("torch", True), ("auto", True), ("auto", False)):
        monkeypatch.setattr(kernel_sets, "transformer_engine_installed", lambda i=installed: i)
        overrides = ["experiment=gpu_3b", f"backend.kernels={kernels}"]
        run = resolve_on_devices(overrides, seen)
        report = estimate(run).report()
        need[kernels, installed] = max(s["total_bytes"] for s in report["memory"]["stages"])
        taken = {"auto": "te" if installed else "torch"}.get(kernels, kernels)
        assert report["kernels"]["name"] == taken
    assert need["te", False] == need["auto", True] < need["torch", True] == need["auto", False]


def test_what_nvidia_smi_does_not_say(tmp_path: Path) -> None:
    failing = smi(tmp_path / "failing", "echo 'Driver/library version mismatch'; exit 18")
    result = read_devices(failing, tmp_path)
    assert not result.complete and "version mismatch" in result.problem
    garbled = smi(tmp_path / "garbled", "echo a, b")
    assert not read_devices(garbled, tmp_path).complete
    without = read_devices(smi(tmp_path / "na", "echo 0, GPU-0, NVIDIA GB10, [N/A]"), tmp_path)
    assert not without.complete, "memory is for torch to say"
    nothing = {"PATH": "/nowhere"}
    assert read_devices(nothing, tmp_path) == read_devices(nothing, tmp_path / "absent")
    assert read_devices(nothing, tmp_path).complete
    (tmp_path / "nvidia0").touch()
    assert not read_devices(nothing, tmp_path).complete


def test_a_table_of_memory_alone() -> None:
    first, second = parse_table("81559\n\n40960\n")
    assert first.memory_gb > second.memory_gb
    assert first.uuid != second.uuid
