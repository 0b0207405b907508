"""Does a plan fit the device's memory, and which overrides would make it fit?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moe_train.config.hardware import MachineFacts
from moe_train.config.root import Config
from moe_train.errors import ConfigError
from moe_train.parallel.optimizer_state import variants
from moe_train.parallel.resolved import ResolvedRun
from moe_train.planner.memory.stages import GB, StageMemory, plan_memory, stage_memory, worst
from moe_train.planner.plan import Plan, assumptions_of

FIELD = "memory"
"""Field of the error of a plan that does not fit."""
TIGHT = 0.1
"""Share of a device's memory; a plan that leaves less is called tight, and a search prefers plans
that leave it: room for what the estimate leaves out, and for steps that route less evenly than
assumed. Assumed."""


def fits(plan: Plan) -> bool:
    """Whether the end stages, which need most, fit the profile's memory, allowances included."""
    ends = {0, plan.layout.pipeline - 1}
    return all(stage_memory(plan, stage).margin >= 0 for stage in ends)


def margin_warning(need: StageMemory) -> str | None:
    """A sentence about a stage whose margin is small or gone; None where there is enough.

    Args:
        need: the stage that needs most.
    """
    if need.margin >= TIGHT * need.device:
        return None
    spare = (need.fragmentation + need.reserved) / GB
    figures = (
        f"stage {need.stage} needs {need.total / GB:.1f} of {need.device / GB:.1f} GB, of which "
        f"{spare:.1f} GB are allowances for fragmentation and for memory outside of tensors"
    )
    if need.margin < 0:
        return f"memory: may not fit: {figures}"
    left = f"{need.margin / GB:.1f} GB ({need.margin / need.device:.1%}) left"
    return f"memory: tight, {left}: {figures}"


def changes(plan: Plan) -> Iterator[tuple[str, float]]:
    """Overrides that may need less memory, and the bytes of the worst stage with each."""
    for config, overrides in _changes(plan.config):
        yield overrides, worst(plan_memory(plan.under(config))).total


def lighter(plan: Plan) -> list[tuple[str, float]]:
    """Overrides with which the worst stage needs less than now, and its bytes then; least first."""
    now = worst(plan_memory(plan)).total
    return sorted((one for one in changes(plan) if one[1] < now), key=lambda one: one[1])


def _changes(config: Config) -> Iterator[tuple[Config, str]]:
    options = variants(config)
    for name in ("distributed", "precision-aware", "offloaded"):
        yield options[name]
    if config.recompute.layers != "all":
        everything = replace(config.recompute, layers="all", modules=[])
        yield replace(config, recompute=everything), "recompute=all"
        changed, overrides = options["precision-aware"]
        yield replace(changed, recompute=everything), f"{overrides} recompute=all"
    if config.batch.micro > 1:
        yield replace(config, batch=replace(config.batch, micro=1)), "batch.micro=1"


def memory_fault(plan: Plan) -> ConfigError | None:
    """Why the plan does not fit the profile's device, or None if it does."""
    need, hardware = worst(plan_memory(plan)), plan.config.hardware
    if need.margin >= 0:
        return None
    fixes = [
        f"{overrides} ({size / GB:.1f} GB)"
        for overrides, size in changes(plan)
        if size <= plan.device_bytes
    ]
    return ConfigError(
        FIELD,
        f"stage {need.stage} needs {need.total / GB:.1f} GB a device: "
        f"{need.state.device / GB:.1f} GB weights, gradients and optimizer, "
        f"{need.activations / GB:.1f} GB activations, "
        f"{(need.fragmentation + need.reserved) / GB:.1f} GB outside of tensors; "
        f"{hardware.name} has {hardware.memory_gb:g} GB",
        "\n      or ".join(fixes) or "more ranks, or hardware with more memory",
    )


def on_devices(run: ResolvedRun, facts: MachineFacts) -> Plan:
    """The plan of `run` with the memory of this machine's devices, whatever its profile has."""
    smallest = replace(
        run.config.hardware,
        name=f"the smallest of the ranks' devices ({facts.device or facts.kind})",
        kind="accelerator",
        memory_gb=round(facts.memory_gb, 1),
    )
    here = replace(run.config, hardware=smallest)
    return Plan.of(run, assumptions_of(here)).under(here)


def launch_fault(run: ResolvedRun, facts: MachineFacts) -> ConfigError | None:
    """Why `run` certainly does not fit the devices of this machine, or None if it may.

    Judged are the tensors of evenly routed steps and the driver's context alone, without the
    allowances that a plan makes; `launch_warning` judges those. A CPU's ranks share their memory
    with everything else, so nothing is refused there.
    """
    if facts.kind == "cpu":
        return None
    plan = on_devices(run, facts)
    hardware = replace(plan.config.hardware, reserved_gb=plan.config.hardware.outside_gb(1))
    least = replace(plan.assumptions, fragmentation=0.0, memory_imbalance=1.0)
    return memory_fault(
        replace(plan, config=replace(plan.config, hardware=hardware), assumptions=least)
    )


def launch_warning(run: ResolvedRun, facts: MachineFacts) -> str | None:
    """`margin_warning` of `run` on the devices of this machine; None on a CPU."""
    if facts.kind == "cpu":
        return None
    return margin_warning(worst(plan_memory(on_devices(run, facts))))
