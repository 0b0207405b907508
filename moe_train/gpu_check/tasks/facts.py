"""The machine: devices, driver, versions, and what of the needed packages imports."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

NEEDED = (
    "torch",
    "numpy",
    "yaml",
    "hydra",
    "omegaconf",
    "pydantic",
    "rich",
    "filelock",
    "psutil",
    "networkx",
)
"""Modules without which nothing trains, and Megatron, which a backend prepares for before it is
imported and is therefore only looked for."""


def devices() -> dict[str, Any]:
    """How many GPUs torch can use, and what it says of them."""
    import torch

    from moe_train.backend.cuda.probe import cuda_facts

    count, reason = cuda_facts()
    built_for = torch.version.cuda or torch.version.hip
    return {"count": count, "built_for": built_for, "error": reason}


def facts(gpu: bool) -> dict[str, Any]:
    """Hardware and versions, and ``missing``: needed packages that do not import, with why."""
    missing = {}
    for name in NEEDED:
        try:
            importlib.import_module(name)
        # A broken wheel raises what it likes.
        except Exception as error:  # noqa: BLE001
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if not _there("megatron.core"):
        missing["megatron.core"] = "no such module on the path"
    result: dict[str, Any] = {
        "host": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": _try(_memory),
        "python": platform.python_version(),
    }
    for name in ("torch", "megatron-core", "triton", "transformer-engine", "numpy"):
        result[name] = _try(partial(importlib.metadata.version, name))
    if "torch" not in missing:
        import torch

        result["cpu_capability"] = _try(torch.backends.cpu.get_cpu_capability)
        result["cuda_of_torch"] = torch.version.cuda
        if gpu:
            result |= _devices()
    return {"machine": result, "missing": missing}


def _there(name: str) -> bool:
    """Whether a module is on the path; only its parents are imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _devices() -> dict[str, Any]:
    import torch

    result: dict[str, Any] = {"gpus": _try(torch.cuda.device_count)}
    for key, read in {
        "gpu": lambda: torch.cuda.get_device_name(0),
        "gpu_memory_gb": lambda: round(torch.cuda.get_device_properties(0).total_memory / 1e9, 2),
        "multiprocessors": lambda: torch.cuda.get_device_properties(0).multi_processor_count,
        "capability": lambda: ".".join(map(str, torch.cuda.get_device_capability(0))),
        "nccl": lambda: ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": torch.backends.cudnn.version,
        "driver": lambda: _smi("driver_version"),
        "power_limit_w": lambda: _smi("power.limit"),
        "clocks_mhz": lambda: _smi("clocks.max.sm"),
        "mig": lambda: _smi("mig.mode.current"),
        "peer_access": _peers,
    }.items():
        result[key] = _try(read)
    return result


def _peers() -> str:
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return "one GPU"
    pairs = itertools.permutations(range(count), 2)
    able = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    return f"{able} of {count * (count - 1)} pairs"


def _smi(field: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown: no nvidia-smi"
    listed = subprocess.run(
        [program, f"--query-gpu={field}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return ", ".join(dict.fromkeys(line.strip() for line in listed.stdout.splitlines()))


def _memory() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def processor() -> str:
    """The CPU's model name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _try(read: Callable[[], Any]) -> Any:
    """A fact, or why it is not known: no single one may cost the others."""
    try:
        return read()
    except Exception as error:  # noqa: BLE001
        return f"unknown: {type(error).__name__}"
