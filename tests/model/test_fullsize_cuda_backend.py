"""The CUDA backend as far as a machine without a GPU shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moe_train.backend import kernels, patches, select
from moe_train.backend.cuda import backend as cuda
from moe_train.backend.cuda import probe
from moe_train.backend.cuda.devices import Devices
from moe_train.config.kernels import TORCH
from moe_train.config.training import BackendConfig
from moe_train.errors import EXIT_CONFIG, ConfigError
from moe_train.run import resolution

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test writes into the environment does not outlive it."""
    for name in (
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "NCCL_IB_QPS_PER_CONNECTION",
        "NCCL_ALGO",
        "NCCL_DEBUG",
    ):
        monkeypatch.setenv(name, "before")
    kernels.transformer_engine_problem.cache_clear()


def test_asking_for_cuda_without_a_gpu_is_refused_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", "device=cuda", "parallel=single", f"run.dir={tmp_path}/runs"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert "device: device=cuda, but" in done.stderr
    assert "device=cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("checkpoints/*"))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_the_environment_is_written_before_a_gpu_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, str] = {}

    def facts() -> tuple[int, str]:
        seen.update(os.environ)
        return 2, ""

    monkeypatch.setattr(select, "cuda_facts", facts)
    monkeypatch.setenv("LOCAL_RANK", "1")
    config = BackendConfig(
        cuda_device_max_connections=8, nccl={"ib_qps_per_connection": "2", "NCCL_ALGO": "Ring"}
    )
    chosen = select.select_backend("auto", config)
    assert isinstance(chosen, cuda.CudaBackend)
    assert str(chosen.device) == "cuda:1"
    assert seen["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert seen["NCCL_IB_QPS_PER_CONNECTION"] == "2"
    assert seen["NCCL_ALGO"] == "Ring"
    assert seen["NCCL_DEBUG"] == "before", "not in the config, so none of its business"


def test_the_host_leaves_the_environment_alone() -> None:
    assert select.select_backend("cpu", BackendConfig()).name == "cpu"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "before"


def test_more_ranks_than_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "cuda_facts", lambda: (2, ""))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="2 usable GPU"):
        select.select_backend("cuda", BackendConfig())


def test_torch_is_asked_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that CUDA has not started here before its environment is written."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(probe, "cuda_facts", lambda: pytest.fail("asked here"))
    result = resolution._complete(Devices(complete=False, problem="nvidia-smi failed: x"))
    assert not result.gpus and result.complete
    assert result.problem.startswith("nvidia-smi failed: x; ")
    monkeypatch.setattr(probe.sys, "executable", "/nowhere/python")
    assert "torch cannot list" in probe.torch_devices().problem


def without_device(monkeypatch: pytest.MonkeyPatch, engine: ModuleType | None) -> None:
    """A process that could take its GPU; ``engine`` is TransformerEngine, or None."""
    monkeypatch.setattr(cuda.torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(cuda.patches, "apply_missing_te", lambda lean: None)
    monkeypatch.setitem(sys.modules, "transformer_engine", engine)
    if engine is not None:
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)


def test_a_missing_transformer_engine_is_told_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_device(monkeypatch, None)
    with pytest.raises(ConfigError, match="TransformerEngine cannot be used") as refused:
        cuda.CudaBackend(0, BackendConfig(kernels="te")).prepare()
    assert refused.value.field == "backend.kernels"
    assert "backend.kernels=torch" in str(refused.value)


@pytest.mark.parametrize(
    ("requested", "installed", "taken"),
    [
        ("auto", True, "te"),
        ("auto", False, "torch"),
        ("te", True, "te"),
        ("torch", True, "torch"),
        ("torch", False, "torch"),
    ],
)
def test_kernels_are_taken_by_what_imports(
    monkeypatch: pytest.MonkeyPatch, requested: str, installed: bool, taken: str
) -> None:
    without_device(monkeypatch, ModuleType("transformer_engine") if installed else None)
    backend = cuda.CudaBackend(0, BackendConfig(kernels=requested))
    backend.prepare()
    assert backend.kernels.kernels.name == taken
    assert requested in backend.kernels.why
    assert backend.transformer_overrides()["apply_rope_fusion"] is (taken == "te")


def test_torch_kernels_never_import_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    without_device(monkeypatch, None)
    monkeypatch.setattr(cuda, "choose_kernels", kernels.choose_kernels)
    monkeypatch.setattr(kernels, "transformer_engine_problem", lambda: pytest.fail("imported"))
    assert kernels.choose_kernels(BackendConfig(kernels="torch"), on_cpu=False).kernels is TORCH
    assert kernels.choose_kernels(BackendConfig(kernels="auto"), on_cpu=True).kernels is TORCH


@pytest.mark.parametrize(
    ("version", "taken"), [("2.5.0", "torch"), ("2.6.0+1", "te"), ("2.20", "te")]
)
def test_an_old_transformer_engine_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, version: str, taken: str
) -> None:
    engine = ModuleType("transformer_engine")
    engine.__version__ = version  # type: ignore[attr-defined]
    without_device(monkeypatch, engine)
    choice = kernels.choose_kernels(BackendConfig(), on_cpu=False)
    assert choice.kernels.name == taken
    assert taken == "te" or f"it is {version}" in choice.why


def test_a_broken_transformer_engine_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its torch extension is built for one torch: a wrong one fails as it is loaded."""
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "pytorch/__init__.py").write_text("raise OSError('undefined symbol: x')")
    for name in [name for name in sys.modules if name.split(".")[0] == package.name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    choice = kernels.choose_kernels(BackendConfig(), on_cpu=False)
    assert choice.kernels is TORCH
    assert "undefined symbol" in choice.why
    for name in [name for name in sys.modules if name.split(".")[0] == package.name]:
        monkeypatch.delitem(sys.modules, name)


def test_the_reason_stays_when_transformer_engine_is_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run prepares its backend twice: when its device is decided, and when it opens."""
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    first = kernels.choose_kernels(BackendConfig(), on_cpu=False)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("part"))
    patches.hide_transformer_engine()
    assert sys.modules["transformer_engine.pytorch"] is None, "its parts would still be found"
    assert kernels.choose_kernels(BackendConfig(), on_cpu=False) == first


def test_a_cpu_has_torch_kernels_alone() -> None:
    for requested in ("auto", "torch"):
        assert (
            select.select_backend("cpu", BackendConfig(kernels=requested)).kernels.kernels is TORCH
        )
    with pytest.raises(ConfigError, match="no kernels for a CPU"):
        select.select_backend("cpu", BackendConfig(kernels="te"))


class Engine(torch.nn.Linear):
    """As TransformerEngine's layers keep the switch."""

    fuse_wgrad_accumulation = False


def test_weight_gradients_are_fused_without_apex_outside_the_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Megatron's config also governs its own head, whose kernel is Apex's."""
    model = torch.nn.Sequential(Engine(2, 2), torch.nn.Linear(2, 2))
    te = cuda.CudaBackend(0, BackendConfig(kernels="te"))
    assert te.transformer_overrides()["gradient_accumulation_fusion"] is False
    cuda.CudaBackend(0, BackendConfig(kernels="torch")).finish_model(model)
    assert not model[0].fuse_wgrad_accumulation
    te.finish_model(model)
    assert model[0].fuse_wgrad_accumulation
    assert not hasattr(model[1], "fuse_wgrad_accumulation")
    (tmp_path / f"{cuda.WEIGHT_GRADIENT_KERNEL}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert te.transformer_overrides()["gradient_accumulation_fusion"] is True
