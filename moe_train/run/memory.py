"""Out-of-memory errors with the planned memory of the rank, and overrides that need less."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.errors import DeviceMemoryError, MemoryFault
from moe_train.planner.estimate import GB, estimate

if TYPE_CHECKING:
    from moe_train.parallel.resolved import ResolvedRun

MORE = "more ranks, or devices with more memory"


def explain(error: MemoryFault, run: ResolvedRun) -> MemoryFault:
    """``error`` with the planned peak of its rank, and with overrides that need less.

    Host memory is not planned. A second call changes nothing.
    """
    name, _, number = error.field.partition(" ")
    if (
        not isinstance(error, DeviceMemoryError)
        or name != "rank"
        or "the plan has" in error.problem
    ):
        return error
    stage = run.layout.coordinates(int(number)).dense.pp
    plan = estimate(run)
    need = plan.memory[stage]
    fixes = [f"{overrides} (planned: {size / GB:.1f} GB)" for overrides, size in plan.lighter()]
    return DeviceMemoryError(
        error.field,
        f"{error.problem}; the plan has {need.total / GB:.1f} GB for stage {stage} at its peak "
        f"({need.peak.name}): {need.state.device / GB:.1f} GB weights, gradients and optimizer, "
        f"{need.activations / GB:.1f} GB activations, "
        f"{(need.fragmentation + need.reserved) / GB:.1f} GB spare",
        "\n      or ".join([*fixes, MORE]),
    )
