"""The plan of a run, the same on every rank, or one refusal of all ranks.

Three things may differ between ranks: the GPUs that they see, the files that they read, and
whether torch can use what the driver lists. Each rank puts its own into the launcher's store and
takes rank 0's answer from it, before any process group exists.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_train.backend.cuda.devices import Devices, accelerator_present, read_devices
from moe_train.backend.cuda.probe import torch_devices
from moe_train.callbacks.wandb import mode_fault
from moe_train.config.compose import collect
from moe_train.config.convert import to_mapping
from moe_train.errors import ConfigError, ConfigFaults
from moe_train.parallel.layout import Layout
from moe_train.planner.machine.decision import Place, RankTable, decide, place_of
from moe_train.planner.machine.profiles import profile_note
from moe_train.planner.memory.fit import launch_fault, unpriced
from moe_train.planner.prepare import certain_faults, prepare

if TYPE_CHECKING:
    from moe_train.config.root import Config

SHOWN = 4
"""Differing keys that a refusal names."""


class Plan(NamedTuple):
    """What a run is going to be."""

    config: Config
    layout: Layout
    notes: tuple[str, ...] = ()
    """Warnings for the user."""


def planned(
    overrides: Sequence[str],
    world: int,
    known: Callable[[Config, Layout], None] = lambda config, layout: None,
) -> tuple[Config, Layout]:
    """Config and layout of a run, the same on every rank; call on every rank.

    What needs no look at other ranks is refused before torch is imported.

    Args:
        known: called as soon as this rank knows the plan, in the usual case of a CPU before
            torch is imported; may raise.

    Raises:
        ConfigFaults: all faults together.
        ConfigError: the plan does not fit the GPUs' memory, torch cannot use them, or the ranks
            come to different configs.
        HungError: a rank did not come in time.
    """
    place, first = place_of(), collect(overrides)
    config, form = first
    # Of this machine alone: another node may have what this one lacks.
    lacking = list(filter(None, [mode_fault(config.log.wandb)]))
    cpu = config.device == "cpu"
    devices = Devices() if cpu else read_devices()
    if world == 1 and not devices.complete and not form:
        if certain := certain_faults(overrides, world):
            raise ConfigFaults([*certain, *lacking])
        devices = _complete(devices)
    here = _alike(place, devices)
    plan = None
    if form or cpu or world == 1 or (place.alone and not accelerator_present()):
        # Refused whatever the others see, or the others see the same.
        try:
            plan = plan_for(overrides, here, first)
        except ConfigFaults as refused:
            raise ConfigFaults([*refused.faults, *lacking]) from refused
        if lacking and place.alone:
            raise ConfigFaults(lacking)
        known(plan.config, plan.layout)
    elif certain := certain_faults(overrides, world):
        raise ConfigFaults([*certain, *lacking])
    if world > 1:
        seconds = 2 * config.backend.timeout_seconds
        agreed = _agree(overrides, place, _complete(devices), here, plan, lacking, seconds)
    else:
        assert plan is not None
        agreed = plan
        if (unusable := _unusable(plan.config, place, devices)) is not None:
            raise unusable
    if plan is None:
        known(agreed.config, agreed.layout)
    if place.rank == 0:
        for note in agreed.notes:
            print(f"warning: {note}", flush=True)
    return agreed.config, agreed.layout


def _complete(devices: Devices) -> Devices:
    """`devices`, completed by torch where nvidia-smi does not describe them."""
    if devices.complete:
        return devices
    seen = torch_devices()
    if seen.gpus:
        return seen
    return Devices(problem="; ".join(filter(None, (devices.problem, seen.problem))))


def _alike(place: Place, devices: Devices) -> list[RankTable]:
    """Tables of all ranks, if all nodes are like this one."""
    size = place.local_world
    return [
        RankTable(Place(rank, place.world, rank % size, size), devices.gpus, devices.problem)
        for rank in range(place.world)
    ]


def plan_for(
    overrides: Sequence[str],
    tables: Sequence[RankTable],
    first: tuple[Config, list[ConfigError]] | None = None,
) -> Plan:
    """The plan of ranks that see `tables`, a pure function of its arguments.

    Args:
        first: ``collect(overrides)``, where it is there already.

    Raises:
        ConfigFaults: all faults together.
        ConfigError: the plan does not fit the GPUs' memory.
    """
    world, first = len(tables), first or collect(overrides)
    try:
        facts = decide(first[0].device, tables)
    except ConfigError as refused:
        raise ConfigFaults([*certain_faults(overrides, world), refused]) from refused
    config, layout = prepare(overrides, world, facts, first)
    notes = [*facts.notes]
    if facts.kind != "cpu":
        notes += filter(None, [profile_note(config.hardware)])
        fault = launch_fault(config, layout, facts)
        if fault is not None:
            if not (changed := unpriced(config)):
                raise fault
            notes.append(
                f"{fault}\n    continuing: the memory estimate does not cover {', '.join(changed)}"
            )
    return Plan(config, layout, tuple(notes))


def _unusable(config: Config, place: Place, devices: Devices) -> ConfigError | None:
    """Why this rank cannot use the decided device, or None; prepares the process for it."""
    from moe_train.backend.cuda.probe import disagreement
    from moe_train.backend.select import select_backend

    if config.device == "cpu":
        return None
    where = f"local rank {place.local_rank}"
    try:
        backend = select_backend(config.device, config.backend)
        backend.prepare()
        difference = disagreement(backend.device, devices)
    except ConfigError as fault:
        return fault
    except (RuntimeError, OSError) as problem:
        # CUDA's own errors: a card that is full, held exclusively, or broken.
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        refusal = ConfigError(
            "device",
            f"{where} cannot take its GPU: {reason[0]}",
            "see with nvidia-smi who uses the GPU and whether it is healthy; device=cpu runs the "
            "same program on gloo",
        )
        refusal.__cause__ = problem
        return refusal
    if difference:
        return ConfigError(
            "device",
            f"{where}: {difference}",
            "name the GPUs or the MIG slice in CUDA_VISIBLE_DEVICES, or repair what differs",
        )
    return None


def _agree(
    overrides: Sequence[str],
    place: Place,
    devices: Devices,
    here: Sequence[RankTable],
    plan: Plan | None,
    lacking: list[ConfigError],
    seconds: float,
) -> Plan:
    """The plan for what all ranks see, once all of them have the same one and can run it."""
    from moe_train.backend.consensus import settle

    mine = RankTable(place, devices.gpus, devices.problem)
    gathered = settle("devices", mine.to_json(), _join, place.rank, place.world, seconds)
    tables = [RankTable.from_mapping(table) for table in json.loads(gathered)]
    faults = list(lacking)
    if plan is None or tables != here:
        try:
            plan = plan_for(overrides, tables)
        except ConfigError as refused:
            faults = [refused, *lacking]
    if plan is not None and not faults and (unusable := _unusable(plan.config, place, devices)):
        faults = [unusable]
    outcome = {
        "faults": [part for fault in faults for part in _parts(fault)],
        "config": to_mapping(plan.config) if plan and not faults else None,
    }
    verdict = json.loads(
        settle("plan", json.dumps(outcome), compare, place.rank, place.world, seconds)
    )
    if verdict is not None:
        # This rank's own keeps its cause.
        raise _error(verdict) from (faults[0] if faults else None)
    assert plan is not None
    return plan


def _join(values: Sequence[str]) -> str:
    return f"[{','.join(values)}]"


def compare(values: Sequence[str]) -> str:
    """Rank 0's verdict on every rank's outcome: null, or the parts of the error of all ranks."""
    outcomes = [json.loads(one) for one in values]
    faulty = [rank for rank, one in enumerate(outcomes) if one["faults"]]
    if faulty:
        parts = outcomes[faulty[0]]["faults"]
        if any(one["faults"] != outcomes[faulty[0]]["faults"] for one in outcomes):
            parts = [[field, f"rank {faulty[0]}: {problem}", fix] for field, problem, fix in parts]
        return json.dumps(parts)
    first = outcomes[0]["config"]
    for rank, one in enumerate(outcomes):
        if differing := list(_differences(first, one["config"])):
            shown = "; ".join(
                f"{key} is {theirs!r} there and {ours!r} on rank 0"
                for key, ours, theirs in differing[:SHOWN]
            )
            more = len(differing) - SHOWN
            problem = f"its config differs from rank 0's: {shown}"
            problem += f"; and {more} more keys" if more > 0 else ""
            fix = "start all ranks with the same overrides, and the same files of the package"
            return json.dumps([[f"rank {rank}", problem, fix]])
    return "null"


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Dotted keys of two nested mappings that differ, with both values."""
    differing: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            differing += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            differing.append((prefix + key, a, b))
    return differing


def _parts(fault: ConfigError) -> list[list[str]]:
    faults = fault.faults if isinstance(fault, ConfigFaults) else (fault,)
    return [[one.field, one.problem, one.fix] for one in faults]


def _error(parts: Sequence[Sequence[str]]) -> ConfigError:
    return ConfigFaults([ConfigError(*one) for one in parts])
