"""Build the fake CUDA driver library (``runtime.c``) and an ``nvidia-smi`` script."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from moe_train.errors import ConfigError

SOURCE = Path(__file__).with_name("runtime.c")
NAME = "libcuda.so.1"
LINKS = ("libnvidia-ml.so.1",)
GIGABYTE = 10**9
MEBIBYTE = 2**20

LISTING = """#!/bin/sh
# One line a device, as nvidia-smi --query-gpu=... --format=csv,noheader,nounits prints.
number=0
while [ "$number" -lt "${MOE_TRAIN_REHEARSAL_DEVICES:-1}" ]; do
  size=$((MOE_TRAIN_REHEARSAL_BYTES / 1048576))
  case "$*" in
    *uuid*) echo "$number, GPU-rehearsal-$number, $MOE_TRAIN_REHEARSAL_NAME, $size" ;;
    *) echo "$size" ;;
  esac
  number=$((number + 1))
done
"""


def obstacle() -> str | None:
    """Why this machine cannot rehearse; None if it can."""
    if compiler() is None:
        return "there is no C compiler (cc, gcc or clang)"
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    if not (Path(torch.origin).parent / "lib" / "libtorch_cuda.so").exists():
        return "this torch is built without CUDA"
    return None


def compiler() -> str | None:
    """Path of a C compiler."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def build(folder: Path) -> None:
    """Build the library into ``folder``, beside an ``nvidia-smi`` that lists its devices.

    Raises:
        ConfigError: there is no C compiler, or it fails.
    """
    program = compiler()
    if program is None:
        raise ConfigError("rehearsal", "there is no C compiler", "install cc, gcc or clang")
    command = [program, "-shared", "-fPIC", "-O1", "-pthread", f"-Wl,-soname,{NAME}"]
    made = subprocess.run(
        [*command, "-o", str(folder / NAME), str(SOURCE)], capture_output=True, text=True
    )
    if made.returncode:
        raise ConfigError("rehearsal", f"{program} failed: {made.stderr}", "see its message")
    for link in LINKS:
        (folder / link).symlink_to(NAME)
    listing = folder / "nvidia-smi"
    listing.write_text(LISTING)
    listing.chmod(0o755)


def environment(folder: Path, devices: int, memory_gb: float) -> dict[str, str]:
    """Environment of a process that rehearses, with the library from ``folder``.

    Args:
        memory_gb: memory of each device, 1e9 bytes.
    """
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CUDA_VISIBLE_DEVICES", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    }

    def first(name: str, value: str) -> str:
        return os.pathsep.join(filter(None, (value, variables.get(name))))

    return variables | {
        "LD_PRELOAD": first("LD_PRELOAD", str(folder / NAME)),
        "LD_LIBRARY_PATH": first("LD_LIBRARY_PATH", str(folder)),
        "PATH": first("PATH", str(folder)),
        "MOE_TRAIN_REHEARSAL_DEVICES": str(devices),
        "MOE_TRAIN_REHEARSAL_BYTES": str(int(memory_gb * GIGABYTE)),
        "MOE_TRAIN_REHEARSAL_NAME": "rehearsal",
        # Counted by the other way, devices forbid torch to use them after a fork.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
