"""Which GPUs this process sees, from nvidia-smi and CUDA_VISIBLE_DEVICES, without importing torch.

``python -m moe_train.backend.cuda.devices`` shows the table. Every rank reads its own; what all of
them make of it together is `moe_train.planner.machine.devices`'s.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

QUERY = ("index", "uuid", "name", "memory.total")
TIMEOUT = 60
"""Seconds for nvidia-smi, which loads the driver where nothing keeps it loaded."""
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver lists it."""

    uuid: str
    """``GPU-...``, or ``index N`` where the driver's list has none."""
    name: str
    """As the driver writes it, e.g. ``NVIDIA H100 80GB HBM3``; empty where unknown."""
    memory_gb: float
    """Whole memory in GB (1e9 bytes); 0 where unknown."""


@dataclass(frozen=True)
class Devices:
    """The GPUs that this process may use, in the order in which CUDA numbers them."""

    gpus: tuple[Gpu, ...] = ()
    complete: bool = True
    """False where a driver is there that nvidia-smi does not describe: ask torch."""
    problem: str = ""
    """Why the list may be wrong, for a warning."""


def read_devices(
    environment: Mapping[str, str] | None = None, devices: Path = Path("/dev")
) -> Devices:
    """The table of this process.

    Args:
        environment: None takes the process's.
        devices: folder of device nodes.
    """
    variables = os.environ if environment is None else environment
    program = shutil.which("nvidia-smi", path=variables.get("PATH"))
    if program is None:
        present = accelerator_present(devices, variables)
        why = "there is no nvidia-smi to list this machine's GPUs" if present else ""
        return Devices(complete=not present, problem=why)
    try:
        listed = subprocess.run(
            [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=True,
            env=dict(variables),
        ).stdout
        physical = parse_table(listed)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        output = getattr(error, "stdout", None) or getattr(error, "stderr", None)
        reason = " ".join(str(output or error).split())[:200]
        return Devices(complete=False, problem=f"nvidia-smi failed: {reason}")
    wanted = variables.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and wanted.startswith("MIG-"):
        # This query lists no slices, and CUDA shows a process one of them.
        return Devices(complete=False, problem="CUDA_VISIBLE_DEVICES names a MIG slice")
    chosen = [physical[index] for index in visible([gpu.uuid for gpu in physical], wanted)]
    if not all(gpu.memory_gb for gpu in chosen):
        return Devices(complete=False, problem="nvidia-smi lists no memory size of the GPUs")
    return Devices(tuple(chosen), problem=_ignored(wanted, len(chosen), len(physical)))


def _ignored(wanted: str | None, shown: int, there: int) -> str:
    """What to say of a CUDA_VISIBLE_DEVICES with entries that CUDA takes for no GPU."""
    named: list[str] = []
    for text in (wanted or "").split(","):
        if text.strip() in ("", "-1"):
            break  # Meant to end the list.
        named.append(text)
    if not there or shown >= len(named):
        return ""
    return f"CUDA_VISIBLE_DEVICES={wanted} shows {shown} of this machine's {there} GPUs"


def parse_table(listed: str) -> list[Gpu]:
    """GPUs of ``nvidia-smi --query-gpu``'s lines, in the driver's (PCI bus) order.

    A line of one field is a memory size alone (MiB); a size that the driver does not have
    (``[N/A]``, as on parts that share the host's memory) is 0.

    Raises:
        ValueError: a line has another form.
    """
    gpus = []
    for number, line in enumerate(filter(str.strip, listed.splitlines())):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) not in (1, len(QUERY)):
            raise ValueError(f"unexpected line {line!r}")
        _, uuid, name, memory = fields if len(fields) > 1 else ("", "", "", fields[0])
        size = 0.0 if memory.startswith("[") else float(memory)
        gpus.append(Gpu(uuid or f"index {number}", name, size * MEBIBYTE / 1e9))
    return gpus


def visible(uuids: Sequence[str], wanted: str | None) -> list[int]:
    """Indices into ``uuids`` that CUDA shows under ``CUDA_VISIBLE_DEVICES=wanted``, in its order.

    The CUDA C++ Programming Guide, "CUDA environment variables": indices or prefixes of UUIDs;
    the first entry that names no device ends the list, one that comes twice empties it. Text
    after an index is ignored, as strtoul ignores it.
    """
    if wanted is None:
        return list(range(len(uuids)))
    by_uuid = wanted.startswith("GPU-")
    indices: list[int] = []
    entries: set[str | int] = set()
    for text in wanted.split(","):
        entry = _uuid(text) if by_uuid else _number(text)
        if entry is None:
            break
        if entry in entries:
            return []
        entries.add(entry)
        indices.append(_index(entry, uuids))
    known = indices.index(-1) if -1 in indices else len(indices)
    return indices[:known] if len(set(indices[:known])) == known else []


def _uuid(text: str) -> str | None:
    return text if text.startswith("GPU-") else None


def _number(text: str) -> int | None:
    digits = re.match(r"[+-]?[0-9]+", text.strip())
    number = int(digits[0]) if digits else -1
    return number if number >= 0 else None


def _index(entry: str | int, uuids: Sequence[str]) -> int:
    """-1 for what names no device, or several."""
    if isinstance(entry, int):
        return entry if entry < len(uuids) else -1
    matches = [index for index, uuid in enumerate(uuids) if uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else -1


def accelerator_present(
    devices: Path = Path("/dev"), environment: Mapping[str, str] | None = None
) -> bool:
    """Whether a driver has made any GPU visible; False only where there is certainly none.

    A container may have a GPU without nvidia-smi, so its absence alone proves nothing.
    """
    path = (os.environ if environment is None else environment).get("PATH")
    if shutil.which("nvidia-smi", path=path):
        return True
    return any(any(devices.glob(name)) for name in ("nvidia[0-9]*", "kfd", "dxg"))


def main() -> int:
    """Print the table."""
    table = read_devices()
    for gpu in table.gpus:
        print(f"{gpu.name or 'unnamed'}  {gpu.memory_gb:.1f} GB  {gpu.uuid}")
    if not table.gpus:
        print("no GPU")
    if table.problem:
        print(f"warning: {table.problem}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
