"""Environment variables that CUDA, NCCL and torch's allocator read once, when they start."""

from __future__ import annotations

import os

from moe_train.config.environment import ALLOCATORS, LAZY, settings
from moe_train.config.training import BackendConfig

NCCL2 = LAZY[0]
"""Read by torch 2.15 when a group of NCCL is created for the first time."""


def set_environment(config: BackendConfig) -> list[str]:
    """Write the environment variables of a config; call before anything asks for a GPU.

    The config wins over the environment, so that config.yaml of a run is the truth about it. Two
    things stay: NCCL settings that the config does not name, and settings of
    torch's allocator, of which the config knows but one.

    Returns:
        One note for each difference from the environment that was found.
    """
    os.environ.setdefault(*LAZY)
    wanted = {name: value for name, value, _ in settings(config)}
    # A run calls this when its device is decided and again when it opens: the second time the
    # values are its own.
    inherited = {
        name: os.environ[name]
        for name in ALLOCATORS
        if os.environ.get(name) not in (None, wanted.get(name))
    }
    notes = []
    for name, value, key in settings(config):
        if name in ALLOCATORS and inherited:
            continue
        before = os.environ.get(name, value)
        if before != value:
            notes.append(f"{name}={before} of the environment is replaced by {value} ({key})")
        os.environ[name] = value
    notes += [
        f"{name}={value} of the environment is kept; backend.expandable_segments is not applied"
        for name, value in inherited.items()
    ]
    return notes
