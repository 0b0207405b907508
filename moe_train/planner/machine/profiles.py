"""The hardware profile of a GPU, by the name that its driver reports.

Profiles are the files of ``configs/hardware``; ``devices`` of each are regular expressions of whole
names. If several profiles match a name (custom 64 GB parts share theirs with parts of other sizes),
memory decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from moe_train.config.compose import config_dir, override_keys
from moe_train.config.files import read_yaml
from moe_train.config.hardware import HardwareConfig, MachineFacts

UNKNOWN = "unknown_gpu"
"""Profile of a GPU that no other profile names: assumed figures, and no MFU."""
CLOSE = 0.2
"""Share by which a device's memory may differ from its profile's: drivers count in GiB and reserve
some."""


@cache
def _profiles() -> dict[str, dict[str, Any]]:
    """Every profile that names devices, by its option."""
    profiles = {}
    for path in sorted((config_dir() / "hardware").glob("*.yaml")):
        content = read_yaml(path, str(path))
        if isinstance(content, dict) and content.get("devices"):
            profiles[path.stem] = content
    return profiles


def profile_of(device: str, memory_gb: float) -> str | None:
    """The profile of one kind of GPU; None if no profile matches.

    Args:
        device: name that the driver reports.
        memory_gb: memory that the driver reports, in GB (1e9 bytes).
    """
    if memory_gb <= 0:
        return None
    fitting = [
        (abs(content["memory_gb"] / memory_gb - 1), name)
        for name, content in _profiles().items()
        if any(re.fullmatch(one, device, re.IGNORECASE) for one in content["devices"])
    ]
    off, name = min(fitting, default=(1.0, ""))
    return name if off <= CLOSE else None


def profile_for(facts: MachineFacts) -> str:
    """The profile of the slowest kind of GPU, or `UNKNOWN` if one kind has no profile."""
    matched = [profile_of(name, memory_gb) for name, memory_gb in facts.kinds]
    known = [name for name in matched if name]
    return min(known, key=_speed) if known and len(known) == len(matched) else UNKNOWN


def _speed(profile: str) -> float:
    peaks = _profiles()[profile]["peak_tflops"]
    return float(peaks.get("bf16", peaks.get("fp32", 0.0)))


def profile_overrides(overrides: Sequence[str], facts: MachineFacts) -> list[str]:
    """The override that chooses the devices' profile; none if the user chooses one."""
    if facts.kind == "cpu" or "hardware" in override_keys(overrides):
        return []
    return [f"hardware={profile_for(facts)}"]


def with_device_figures(
    hardware: HardwareConfig, overrides: Sequence[str], facts: MachineFacts
) -> HardwareConfig:
    """`hardware` with the devices' own name, memory and number per node.

    Overrides win, and a profile that the user chooses is not changed.
    """
    keys = override_keys(overrides)
    if facts.kind == "cpu" or "hardware" in keys:
        return hardware
    changes: dict[str, Any] = {"device": facts.device}
    sources = dict(hardware.sources)
    if "hardware.memory_gb" not in keys:
        changes["memory_gb"] = round(facts.memory_gb, 3)
        sources["memory_gb"] = "the device's driver"
    if "hardware.devices_per_node" not in keys and facts.per_node:
        changes["devices_per_node"] = facts.per_node
    return replace(hardware, sources=sources, **changes)


def unknown_device_warning(hardware: HardwareConfig) -> str:
    """The warning that a device has no profile; empty if it has one."""
    if hardware.name != UNKNOWN:
        return ""
    return (
        f"no hardware profile names {hardware.device or 'this GPU'!r}: the plan takes its memory "
        "from the driver and assumes everything else, and there is no MFU; hardware=NAME chooses "
        "a profile, and a file in configs/hardware with its name under `devices` adds one"
    )
