"""What can be known of this machine's accelerators without importing torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from moe_train.config.experiment import MachineFacts


def visible_devices(world: int) -> MachineFacts:
    """Facts for `world` ranks, from nvidia-smi; a machine without it counts as a CPU.

    Fewer devices than ranks on this machine is normal when the plan is for several
    nodes: the smallest device here stands for all.
    """
    none = MachineFacts("cpu", world, 0.0)
    program = shutil.which("nvidia-smi")
    if program is None:
        return none
    try:
        listed = subprocess.run(
            [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
        mebibytes = [float(line) for line in listed.split()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return none
    if not mebibytes:
        return none
    return MachineFacts("gpu", world, min(mebibytes) * 2**20 / 1e9)


def accelerator_present(devices: Path = Path("/dev")) -> bool:
    """Whether a driver has made any GPU visible; False only where there is certainly none.

    A container may have a GPU without nvidia-smi, so its absence alone proves nothing.
    """
    if shutil.which("nvidia-smi"):
        return True
    return any(any(devices.glob(name)) for name in ("nvidia*", "kfd", "dxg"))
