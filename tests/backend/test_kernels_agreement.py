"""All ranks take one kernel set, or none starts."""

from __future__ import annotations

import pytest

from moe_train.testing.world import run_world


def _taken(rank: int, world: int, names: list[str]) -> str:
    from moe_train.backend.groups import open_world
    from moe_train.backend.select import select_backend
    from moe_train.config.kernels import KERNEL_SETS, KernelChoice
    from moe_train.config.training import BackendConfig
    from moe_train.errors import ConfigError
    from moe_train.run.broadcast import check_same_kernels

    open_world(select_backend("cpu", BackendConfig()), rank, world, 60)
    try:
        check_same_kernels(KernelChoice(KERNEL_SETS[names[rank]], f"why {rank}"))
    except ConfigError as refused:
        assert refused.field == "backend.kernels"
        return str(refused)
    return ""


@pytest.mark.world
def test_ranks_with_other_kernels_are_refused_on_every_rank() -> None:
    first, second = run_world(_taken, 2, ["te", "torch"])
    assert first == second
    assert "rank 0 uses te (why 0), rank 1 torch (why 1)" in first
    assert "backend.kernels=torch" in first
    assert run_world(_taken, 2, ["torch", "torch"]) == ["", ""]
