"""The CUDA backend as far as a machine without a GPU shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.backend import select
from moe_train.backend.cuda import backend as cuda
from moe_train.config.training import BackendConfig
from moe_train.errors import EXIT_CONFIG, ConfigError

ROOT = Path(__file__).resolve().parent.parent


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
    assert "device: cuda was asked for" in done.stderr
    assert "device=cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("checkpoints/*"))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_the_environment_is_written_before_a_gpu_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, str] = {}

    def facts() -> tuple[int, float]:
        seen.update(os.environ)
        return 2, 64.0

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
    assert select.select_backend("cpu", BackendConfig()).name == "host"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "before"


def test_more_ranks_than_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "cuda_facts", lambda: (2, 64.0))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="2 usable GPU"):
        select.select_backend("cuda", BackendConfig())


def test_a_missing_transformer_engine_is_told_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setattr(cuda.torch.cuda, "set_device", lambda device: None)
    with pytest.raises(ConfigError, match="TransformerEngine"):
        cuda.CudaBackend(0).prepare()


def test_weight_gradients_are_fused_only_where_the_kernel_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cuda.CudaBackend(0).transformer_overrides()["gradient_accumulation_fusion"] is False
    (tmp_path / f"{cuda.WEIGHT_GRADIENT_KERNEL}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert cuda.CudaBackend(0).transformer_overrides()["gradient_accumulation_fusion"] is True
