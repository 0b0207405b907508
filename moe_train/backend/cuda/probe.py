"""GPUs as torch sees them, read in a process of its own.

Looking starts CUDA, which reads its environment then: a rank that has yet to write its own asks
another process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from moe_train.backend.cuda.devices import Devices, Gpu

if TYPE_CHECKING:
    import torch

OTHER_SIZE = 0.2
"""Share by which a GPU's memory may differ between the driver's list and torch: the driver keeps
some to itself, and a MIG slice has half of its GPU at most, or shows up as all of it."""
TIMEOUT = 300
"""Seconds for importing torch and starting CUDA on a busy machine."""


def cuda_facts() -> tuple[int, str]:
    """Number of GPUs that torch can use in this process, and why there are none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count(), ""
    if torch.version.cuda is None and torch.version.hip is None:
        return 0, f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return 0, str(error).strip().split(". ")[0].splitlines()[0]
    return 0, "CUDA starts, but shows torch no device"


def disagreement(device: torch.device, devices: Devices) -> str:
    """How torch contradicts the table that the plan was made from; empty if it does not.

    Args:
        device: the one that this process uses.
        devices: the table, in the order of torch's indices.
    """
    import torch

    count = torch.cuda.device_count()
    if count < len(devices.gpus):
        return f"the driver lists {len(devices.gpus)} GPUs, and torch shows {count}"
    listed = devices.gpus[device.index or 0].memory_gb
    actual = torch.cuda.get_device_properties(device).total_memory / 1e9
    if listed and abs(actual / listed - 1) > OTHER_SIZE:
        return f"the driver lists a GPU of {listed:.1f} GB, and torch shows one of {actual:.1f} GB"
    return ""


def torch_devices() -> Devices:
    """The table of this process as torch sees it, where nvidia-smi does not describe it."""
    command = [sys.executable, "-m", "moe_train.backend.cuda.probe"]
    # As the rank will have it: GPUs are numbered by their place on the bus.
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **os.environ}
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, check=True, env=environment
        ).stdout
        content = json.loads(output.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return Devices(problem=f"torch cannot list the GPUs: {error}")
    return Devices(tuple(Gpu(**gpu) for gpu in content["gpus"]), problem=content["problem"])


def main() -> int:
    """Print this process's table as a line of JSON."""
    import torch

    count, reason = cuda_facts()
    gpus = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        # ROCm's have no uuid; an index stands for a GPU as long as all ranks see the same list.
        uuid = str(getattr(properties, "uuid", f"index {index}"))
        gpus.append(Gpu(uuid, properties.name, properties.total_memory / 1e9))
    print(json.dumps({"gpus": [asdict(gpu) for gpu in gpus], "problem": reason}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
