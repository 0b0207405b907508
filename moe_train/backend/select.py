"""Choose the backend: ``device=auto|cpu|cuda``."""

from __future__ import annotations

import os

from moe_train.backend.cuda.environment import set_environment
from moe_train.backend.protocol import Backend
from moe_train.config.training import BackendConfig
from moe_train.errors import ConfigError


def cuda_facts() -> tuple[int, float]:
    """Number of visible GPUs and the smallest one's memory in GB; (0, 0.0) without any."""
    import torch

    if not torch.cuda.is_available():
        return 0, 0.0
    count = torch.cuda.device_count()
    smallest = min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    return count, smallest / 1e9


def select_backend(device: str, config: BackendConfig) -> Backend:
    """Return the backend for ``device``, not yet prepared.

    Raises:
        ConfigError: ``device=cuda`` on a machine without a usable GPU.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device != "cpu":
        # Even counting GPUs starts CUDA, which reads its environment only then.
        notes = set_environment(config)
    count, _ = cuda_facts() if device != "cpu" else (0, 0.0)
    if device == "cuda" and count <= local_rank:
        raise ConfigError(
            "device",
            f"cuda was asked for, but this machine shows {count} usable GPU(s) "
            f"and local rank {local_rank} needs its own",
            "device=cpu runs the same program on gloo; device=auto picks what is there",
        )
    if device == "cuda" or (device == "auto" and count > local_rank):
        from moe_train.backend.cuda.backend import CudaBackend

        if os.environ.get("RANK", "0") == "0":
            for note in notes:
                print(f"note: {note}", flush=True)
        return CudaBackend(local_rank, config)
    from moe_train.backend.host.backend import HostBackend

    return HostBackend(config)
