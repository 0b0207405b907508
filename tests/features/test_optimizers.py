"""Every optimizer is checked, planned, trained, saved and resumed from its one descriptor."""

from __future__ import annotations

import pytest

from moe_train.config.compose import collect
from moe_train.features.optimizers import OPTIMIZERS
from moe_train.parallel.optimizer_state import bytes_per_parameter
from moe_train.planner.legality import check
from moe_train.testing import layouts
from moe_train.testing.compare import compare
from moe_train.testing.layouts import Runs


def faults(*overrides: str) -> list[str]:
    config, result = collect(["experiment=twin", "parallel=single", *overrides])
    return [fault.field for fault in [*result, *check(config, 1)]]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_descriptor_is_legal_and_planned(name: str) -> None:
    config, result = collect(["experiment=twin", f"optim.name={name}", "dtype=bf16"])
    assert not result
    states = len(OPTIMIZERS[name].state_names)
    # bf16 weights, fp32 gradients and master copy, fp32 state.
    assert bytes_per_parameter("bf16", config.optim).total == 2 + 4 + 4 + 4 * states


def test_what_an_optimizer_lacks_is_refused_by_name() -> None:
    aware = ("optim.distributed=true", "optim.precision_aware=true")
    assert faults(*aware) == []
    assert faults("optim.name=sgd", *aware) == ["optim.precision_aware"]
    assert faults("optim.name=adam", "optim.offload=true", "device=cuda") == ["optim.offload"]
    assert faults("optim.name=adagrad") == ["optim.name"]
    # Megatron's own field passed every check and failed at the first save.
    assert faults("megatron.optimizer.optimizer=sgd") == ["megatron.optimizer.optimizer"]


@pytest.mark.world
def test_momentum_goes_on_in_another_layout(small_runs: Runs) -> None:
    sgd = ("optim.name=sgd", "optim.lr=1", "train.steps=5", "checkpoint.every=3")
    single = small_runs.get(layouts.SINGLE, *sgd)
    saved = single.folder / "checkpoints" / "step_00000003"
    moved = small_runs.new(
        layouts.DP2_EP2_DISTRIBUTED, *sgd, "checkpoint.every=0", f"checkpoint.resume={saved}"
    )
    assert moved.column("step") == [4, 5]
    # Without its momentum the norm of step 5 is 4 % off.
    result = compare(moved, single)
    assert result.within(), str(result)
