"""As many ranks as GPUs: what `make train` and the launchers start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_train.backend.cuda.ranks import ranks

ROOT = Path(__file__).resolve().parents[2]


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def driver(folder: Path, gpus: int, **variables: str) -> dict[str, str]:
    """An environment whose nvidia-smi lists some GPUs."""
    lines = "\n".join(f"echo '{n}, GPU-{n}, NVIDIA L4, 23034'" for n in range(gpus))
    program(folder / "bin" / "nvidia-smi", lines)
    return {"PATH": f"{folder}/bin:{os.environ['PATH']}", **variables}


@pytest.mark.parametrize(
    ("gpus", "start"), [(0, 8), (1, 1), (2, 2), (3, 3), (4, 4), (7, 7), (8, 8), (10, 8)]
)
def test_as_many_ranks_as_gpus(tmp_path: Path, gpus: int, start: int) -> None:
    assert ranks(driver(tmp_path, gpus), tmp_path, most=8) == start
    assert ranks(driver(tmp_path, gpus), tmp_path) == max(start, gpus)


def test_only_visible_gpus_count(tmp_path: Path) -> None:
    assert ranks(driver(tmp_path, 8, CUDA_VISIBLE_DEVICES="4,5,6"), tmp_path) == 3
    assert ranks(driver(tmp_path, 8, CUDA_VISIBLE_DEVICES="GPU-7"), tmp_path) == 1
    assert ranks(driver(tmp_path, 8, CUDA_VISIBLE_DEVICES=""), tmp_path) == 8, "on the CPU"


def test_device_nodes_count_where_no_nvidia_smi_does(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert ranks({"PATH": "/nowhere"}, tmp_path) == 3
    assert ranks({"PATH": "/nowhere", "CUDA_VISIBLE_DEVICES": "0,2"}, tmp_path) == 2
    assert ranks({"PATH": "/nowhere", "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, tmp_path) == 2
    assert ranks({"PATH": "/nowhere", "CUDA_VISIBLE_DEVICES": "MIG-a"}, tmp_path) == 1
    assert ranks({"PATH": "/nowhere"}, tmp_path / "without") == 8


def stand_in(folder: Path) -> Path:
    """A Python that says how many ranks it is to start, and otherwise is one."""
    return program(
        folder / "python",
        f'case "$*" in *torch.distributed.run*) echo "$@" ;; *) exec {sys.executable} "$@" ;; esac',
    )


@pytest.mark.parametrize(("gpus", "nproc", "start"), [(3, None, 3), (0, None, 8), (3, "2", 2)])
def test_launchers_start_them(tmp_path: Path, gpus: int, nproc: str | None, start: int) -> None:
    variables = {**os.environ, **driver(tmp_path, gpus), "PYTHON": str(stand_in(tmp_path))}
    variables.pop("CUDA_VISIBLE_DEVICES", None)
    variables.pop("NPROC", None)
    if nproc:
        variables["NPROC"] = nproc
    stamp = tmp_path / "stamp"
    stamp.touch()
    # Newer than all that it is made of: nothing is set up.
    os.utime(stamp, (time.time() + 3600,) * 2)
    make = ["make", "--no-print-directory", "train", f"PY={variables['PYTHON']}", f"STAMP={stamp}"]
    for command in (make, [str(ROOT / "launch" / "torchrun.sh")]):
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert f"--nproc-per-node {start} train.py" in done.stdout.splitlines()[-1], done.stdout
