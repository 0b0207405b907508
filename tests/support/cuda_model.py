"""The CUDA backend's model without a GPU: what it would save, matrix by matrix.

``python -m tests.support.cuda_model WORLD OVERRIDES...`` builds every rank's chunks on fake
tensors out of the modules of ``backend.kernels`` and prints, as JSON, each rank's parameter count
and matrices. With TransformerEngine's it runs in the interpreter of ``launch/build_te.sh``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_train.backend.cuda.backend import CudaBackend
    from moe_train.config.training import BackendConfig


def pretend_gpu(config: BackendConfig) -> CudaBackend:
    """The CUDA backend, prepared: TransformerEngine refuses to build where CUDA is not available.

    Tensors go wherever ``torch.cuda.current_device`` says; the patches for missing CUDA say the
    CPU, and on fake tensors that is only a name.
    """
    import torch

    from moe_train.backend import patches
    from moe_train.backend.cuda.backend import CudaBackend

    torch.cuda.is_available = lambda: True
    if config.kernels == "torch":
        patches.hide_transformer_engine()
    patches.apply_missing_cuda()
    backend = CudaBackend(0, config)
    backend.prepare()
    return backend


def cuda_ranks(overrides: Sequence[str], world: int) -> list[dict[str, Any]]:
    """``parameters`` and sorted ``matrices`` of every rank, built by the CUDA backend."""
    from moe_train.planner.resolution import resolve_run

    run = resolve_run(overrides, world)
    backend = pretend_gpu(run.config.backend)

    from moe_train.measure.dryrun.world import fake_world
    from tests.support.chunks import fake_chunks, parameter_count
    from tests.support.shards import matrices

    ranks = []
    for rank in range(world):
        with fake_world(rank, world):
            chunks = fake_chunks(run, backend)
            ranks.append(
                {"parameters": parameter_count(chunks), "matrices": sorted(matrices(chunks))}
            )
    return ranks


if __name__ == "__main__":
    print(json.dumps(cuda_ranks(sys.argv[2:], int(sys.argv[1]))))
