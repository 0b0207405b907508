"""Imported once by the fork server: torch, Megatron and the host patches, before any fork."""

from __future__ import annotations

from moe_train.backend.cpu.backend import HostBackend
from moe_train.config.training import BackendConfig

HostBackend(BackendConfig()).prepare()

import moe_train.checkpoint.load  # noqa: E402
import moe_train.checkpoint.save  # noqa: E402
import moe_train.data.datasets  # noqa: E402
import moe_train.run.training  # noqa: E402
import moe_train.train.loop  # noqa: E402, F401
