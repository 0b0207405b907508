"""Imported once by the fork server: torch, Megatron and everything else that a run imports."""

from __future__ import annotations

import gc

from moe_train.backend.cpu.backend import CpuBackend
from moe_train.config.compose import collect
from moe_train.config.training import BackendConfig

CpuBackend(BackendConfig()).prepare()

import moe_train.run.main  # noqa: E402
import moe_train.run.training  # noqa: E402, F401

# Hydra imports most of itself when it first composes.
collect([])
# A rank's collector need not walk, and so copy, what all ranks share.
gc.collect()
gc.freeze()
