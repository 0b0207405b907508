"""The CUDA provider's model without a GPU: what it would save, matrix by matrix.

``python -m moe_train.testing.cuda_model WORLD OVERRIDES...`` builds every rank's chunks out of
TransformerEngine's modules on fake tensors and prints, as JSON, each rank's parameter count and
matrices. It needs TransformerEngine, so it runs in the interpreter of ``launch/build_te.sh``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def pretend_gpu() -> None:
    """Let TransformerEngine construct its modules: it refuses where CUDA is not available.

    Its tensors go wherever ``torch.cuda.current_device`` says; the host backend's patches say
    the CPU, and on fake tensors that is only a name.
    """
    import torch

    from moe_train.backend.patches import apply_missing_cuda

    torch.cuda.is_available = lambda: True
    apply_missing_cuda()


def cuda_ranks(overrides: Sequence[str], world: int) -> list[dict[str, Any]]:
    """``parameters`` and sorted ``matrices`` of every rank, built by the CUDA provider."""
    from moe_train.backend.cuda.backend import CudaBackend
    from moe_train.backend.kernels import transformer_engine_problem
    from moe_train.dryrun.world import fake_chunks, fake_world, parameter_count
    from moe_train.plan.prepare import prepare
    from moe_train.testing.shards import matrices

    assert (problem := transformer_engine_problem()) is None, problem
    config, layout = prepare(overrides, world)
    ranks = []
    for rank in range(world):
        with fake_world(rank, world):
            chunks = fake_chunks(config, layout, CudaBackend(0, config.backend))
            ranks.append(
                {"parameters": parameter_count(chunks), "matrices": sorted(matrices(chunks))}
            )
    return ranks


if __name__ == "__main__":
    pretend_gpu()
    print(json.dumps(cuda_ranks(sys.argv[2:], int(sys.argv[1]))))
