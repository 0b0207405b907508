"""Select the backend of a device: ``cpu`` or ``cuda``."""

from __future__ import annotations

import logging
import os

from moe_train.backend.cuda.environment import set_environment
from moe_train.backend.cuda.probe import cuda_facts
from moe_train.backend.protocol import Backend
from moe_train.config.environment import ORDER
from moe_train.config.training import BackendConfig
from moe_train.errors import ConfigError

LOGGER = logging.getLogger(__name__)


def select_backend(device: str, config: BackendConfig) -> Backend:
    """Return the backend for ``device``, not yet prepared.

    A run's device is decided for all its ranks before this. ``auto`` is for a program of one
    rank that has no plan: the GPU if torch can use one, else the CPU.

    Raises:
        ConfigError: the device is cuda, and torch cannot use a GPU for this rank.
    """
    if device != "cpu":
        # nvidia-smi and CUDA_VISIBLE_DEVICES number GPUs by their place on the bus.
        os.environ.setdefault(*ORDER)
        # Even counting GPUs starts CUDA, which reads its environment only then.
        notes = set_environment(config)
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
        count, reason = cuda_facts()
        # A launcher may show each rank its own GPU alone.
        index = 0 if count == 1 else local_rank
        shared = count == 1 and local_rank > 0 and device == "auto"
        if index < count and not shared:
            from moe_train.backend.cuda.backend import CudaBackend

            for note in notes:
                LOGGER.info("note: %s", note)
            return CudaBackend(index, config)
        if device == "cuda":
            raise ConfigError(
                "device",
                f"local rank {local_rank} needs a GPU of its own, and torch shows {count} usable "
                f"GPU(s){f': {reason}' if reason else ''}",
                "repair driver or torch (python -c 'import torch; torch.cuda.init()' shows "
                "what fails), or device=cpu runs the same program on gloo",
            )
    from moe_train.backend.cpu.backend import CpuBackend

    return CpuBackend(config)
