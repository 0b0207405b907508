"""Environment variables that CUDA and NCCL read once, when they start."""

from __future__ import annotations

import os

from moe_train.config.training import BackendConfig


def set_environment(config: BackendConfig) -> None:
    """Write the machine settings of the config; call before anything asks for a GPU.

    What the config says wins over what the environment had: config.yaml of a run is then the
    truth about it. NCCL settings that the config does not name are left as they are.
    """
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = str(config.cuda_device_max_connections)
    for name, value in config.nccl.items():
        os.environ[f"NCCL_{name.upper().removeprefix('NCCL_')}"] = str(value)
