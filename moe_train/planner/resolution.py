"""Resolve overrides into a `ResolvedRun` for a number of ranks, or refuse them with every fault."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.config.compose import collect
from moe_train.config.environment import apply_rules
from moe_train.config.hardware import MachineFacts
from moe_train.config.root import AUTO, Config
from moe_train.config.validate import sizes_refused, validate
from moe_train.errors import ConfigError, ConfigFaults
from moe_train.parallel.resolved import ResolvedRun, resolved_run
from moe_train.parallel.rules import per_rank_options
from moe_train.planner.cost.timing import step_time
from moe_train.planner.legality import check
from moe_train.planner.machine.experiment import (
    compose_for_machine,
    leaves_batch_open,
    resolve_layout_and_batch,
    with_device,
)
from moe_train.planner.machine.profiles import unknown_device_warning
from moe_train.planner.memory.fit import launch_fault, launch_warning
from moe_train.planner.overrides import unpriced_note
from moe_train.planner.plan import Plan
from moe_train.planner.plan_only import plan_only, plan_only_notes
from moe_train.planner.report.better import short_search
from moe_train.planner.search.automatic import resolve

Composed = tuple[Config, list[ConfigError]]
"""Result of `moe_train.config.compose.collect`: a config, and the faults of form."""


def resolve_run(
    overrides: Sequence[str],
    world: int,
    facts: MachineFacts | None = None,
    composed: Composed | None = None,
) -> ResolvedRun:
    """Compose the config, choose device, hardware profile, experiment and layout, check them all.

    Args:
        overrides: Hydra overrides.
        world: number of ranks.
        facts: the machine, from which device=auto, experiment=auto and the hardware profile are
            decided. None plans for the hardware profile, wherever that is computed: device=auto
            is the profile's kind, and experiment=auto has the twin's values. A CPU brings its own
            rules, as ``device=cpu`` does.
        composed: ``collect(overrides)``, if the caller has it already.

    Raises:
        ConfigFaults: every fault of form, value, layout and machine together.
    """
    chosen = False
    if facts is None:
        config, faults = composed or collect(overrides)
        config = with_device(config, config.hardware.kind)
    else:
        config, faults, chosen = compose_for_machine(overrides, facts, composed)
    refused = {fault.field for fault in faults}
    if not sizes_refused([*faults, *validate(config)]):
        open_batch = chosen and leaves_batch_open(overrides)
        config = apply_rules((resolve_layout_and_batch if open_batch else resolve)(config, world))
    # A refused value stands at its default, which is not the user's to answer for.
    # The GPUs that a run is chosen for are this machine's, and so are its kernels.
    here = facts is not None and facts.kind != "cpu"
    layout_faults = check(config, world, here=here)
    faults.extend(fault for fault in layout_faults if fault.field not in refused)
    if (facts is None or config.hardware.device) and "dtype" not in refused:
        faults.extend(dtype_faults(config))
    if faults:
        raise ConfigFaults(faults)
    return resolved_run(config, world).with_notes(plan_only_notes(config))


def resolve_launch(
    overrides: Sequence[str],
    world: int,
    facts: MachineFacts,
    composed: Composed | None = None,
) -> ResolvedRun:
    """As `resolve_run`, for a run that is to start on these devices now: it must fit them.

    Raises:
        ConfigFaults: as `resolve_run`, and what can only be planned.
        ConfigError: the plan does not fit the GPUs' memory.
    """
    run = resolve_run(overrides, world, facts, composed)
    if refused := plan_only(run.config):
        raise ConfigFaults(refused)
    notes = [*facts.notes, *per_rank_options(run.config, run.layout).values()]
    remark = unpriced_note(run.config)
    if facts.kind != "cpu":
        notes += filter(None, [unknown_device_warning(run.config.hardware)])
        notes += filter(None, [_better_note(run)])
        fault = launch_fault(run, facts)
        if fault is None:
            notes += filter(None, [launch_warning(run, facts)])
        elif remark:
            remark = f"{fault}\n    continuing: {remark}"
        else:
            raise fault
    notes += filter(None, [remark])
    return run.with_notes(notes)


def _better_note(run: ResolvedRun) -> str | None:
    """One line about a layout that beats the run's by more than the band; None without one."""
    plan = Plan.of(run)
    better = short_search(plan)
    if not better["overrides"]:
        return None
    return (
        f"{better['layout']} is predicted to take {better['step_seconds']:.3g} s a step, this "
        f"layout {step_time(plan).step:.3g} s: {' '.join(better['overrides'])}"
    )


def certain_faults(overrides: Sequence[str], world: int) -> list[ConfigError]:
    """Faults that do not depend on the devices of the ranks; empty where there may be none.

    With experiment=auto these are faults of form and of single values, since the devices choose
    the rest.

    Raises:
        ConfigFaults: Hydra cannot merge at all.
    """
    config, faults = collect(overrides)
    refused = {fault.field for fault in faults}
    if config.experiment == AUTO:
        others = []
    else:
        if not sizes_refused([*faults, *validate(config)]):
            config = resolve(config, world)
        others = check(config, world)
    return [*faults, *(fault for fault in others if fault.field not in refused)]


def dtype_faults(config: Config) -> list[ConfigError]:
    """A compute dtype that the accelerator's hardware profile has no peak for."""
    hardware = config.hardware
    if hardware.kind != "accelerator" or config.dtype in hardware.peak_tflops:
        return []
    return [
        ConfigError(
            "dtype",
            f"{hardware.name} has no {config.dtype}",
            f"one of {', '.join(hardware.peak_tflops)}, or another hardware profile",
        )
    ]
