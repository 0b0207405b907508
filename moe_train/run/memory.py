"""Memory that ran out, beside what the plan said, and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.errors import DeviceMemoryError, MemoryFault
from moe_train.parallel.vocabulary import vocabulary
from moe_train.planner.memory.fit import assumptions_of, lighter
from moe_train.planner.memory.stages import GB, stage_memory

if TYPE_CHECKING:
    from moe_train.config.root import Config
    from moe_train.parallel.layout import Layout

MORE = "more ranks, or devices with more memory"


def explained(fault: MemoryFault, config: Config, layout: Layout) -> MemoryFault:
    """``fault`` with the planned peak of its rank, and with overrides that need less.

    Host memory has no plan. A second call changes nothing.
    """
    name, _, number = fault.field.partition(" ")
    if (
        not isinstance(fault, DeviceMemoryError)
        or name != "rank"
        or "the plan has" in fault.problem
    ):
        return fault
    stage = layout.coordinates(int(number)).dense.pp
    vocab, assumptions = vocabulary(config)[0], assumptions_of(config)
    need = stage_memory(config, layout, vocab, stage, assumptions)
    fixes = [
        f"{words} (planned: {size / GB:.1f} GB)"
        for words, size in lighter(config, layout, vocab, assumptions)
    ]
    return DeviceMemoryError(
        fault.field,
        f"{fault.problem}; the plan has {need.total / GB:.1f} GB for stage {stage} at its peak "
        f"({need.peak.name}): {need.state.device / GB:.1f} GB weights, gradients and optimizer, "
        f"{need.activations / GB:.1f} GB activations, "
        f"{(need.fragmentation + need.reserved) / GB:.1f} GB spare",
        "\n      or ".join([*fixes, MORE]),
    )
