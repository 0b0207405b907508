"""Resolve a run on every rank and compare the results, before process groups exist.

Every rank resolves the overrides by itself. Three things may differ between ranks: the GPUs that
they see, the files that they read, and whether torch can use what the driver lists. So each rank
puts the GPUs that it sees, then the digest of its `ResolvedRun`, into the launcher's store; if
they differ, all ranks refuse with the same error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_train.backend.cuda.devices import Devices, accelerator_present, read_devices
from moe_train.backend.cuda.probe import torch_devices
from moe_train.callbacks.wandb import mode_fault
from moe_train.config.compose import collect
from moe_train.config.root import Config
from moe_train.errors import ConfigError, ConfigFaults
from moe_train.parallel.resolved import ResolvedRun
from moe_train.planner.machine.devices import Place, RankTable, decide_device, place_of
from moe_train.planner.resolution import Composed, certain_faults, resolve_launch

LOGGER = logging.getLogger(__name__)
SAME_START = "start all ranks with the same overrides, and the same files of the package"
SHOWN = 4
"""Most differing keys that a refusal names."""


def resolve_on_all_ranks(
    overrides: Sequence[str],
    world: int,
    on_resolved: Callable[[ResolvedRun], None] = lambda run: None,
) -> ResolvedRun:
    """Resolve on this rank and compare with the others; call on every rank.

    Faults that do not depend on other ranks are raised before torch is imported.

    Args:
        on_resolved: called as soon as this rank has resolved, on a CPU before torch is imported;
            may raise.

    Raises:
        ConfigFaults: all faults together.
        ConfigError: the plan does not fit the GPUs' memory, torch cannot use them, or the ranks
            come to different configs.
        HungError: a rank did not reach this call in time.
    """
    place, composed = place_of(), collect(overrides)
    config, form_faults = composed
    # Of this machine alone: another node may have what this one lacks.
    local_faults = list(filter(None, [mode_fault(config.log.wandb)]))
    cpu = config.device == "cpu"
    devices = Devices() if cpu else read_devices()
    if world == 1 and not devices.complete and not form_faults:
        if certain := certain_faults(overrides, world):
            raise ConfigFaults([*certain, *local_faults])
        devices = _complete(devices)
    tables = _same_on_every_node(place, devices)
    run: ResolvedRun | None = None
    if form_faults or cpu or world == 1 or (place.alone and not accelerator_present()):
        # Refused whatever the others see, or the others see the same.
        try:
            run = resolve_on_devices(overrides, tables, composed)
        except ConfigFaults as refused:
            raise ConfigFaults([*refused.faults, *local_faults]) from refused
        if local_faults and place.alone:
            raise ConfigFaults(local_faults)
        on_resolved(run)
    elif certain := certain_faults(overrides, world):
        raise ConfigFaults([*certain, *local_faults])
    if world > 1:
        seconds = config.backend.collective_seconds
        compared = _compare_with_peers(
            overrides, place, _complete(devices), tables, run, local_faults, seconds
        )
    else:
        assert run is not None
        compared = run
        if (unusable := _unusable(run.config, place, devices)) is not None:
            raise unusable
    if run is None:
        on_resolved(compared)
    for note in compared.notes:
        LOGGER.warning("%s", note)
    return compared


def _complete(devices: Devices) -> Devices:
    """`devices`, completed by torch where nvidia-smi does not describe them."""
    if devices.complete:
        return devices
    seen = torch_devices()
    if seen.gpus:
        return seen
    return Devices(problem="; ".join(filter(None, (devices.problem, seen.problem))))


def _same_on_every_node(place: Place, devices: Devices) -> list[RankTable]:
    """GPU tables of all ranks, if all nodes are like this one."""
    size = place.local_world
    return [
        RankTable(Place(rank, place.world, rank % size, size), devices.gpus, devices.problem)
        for rank in range(place.world)
    ]


def resolve_on_devices(
    overrides: Sequence[str], tables: Sequence[RankTable], composed: Composed | None = None
) -> ResolvedRun:
    """`ResolvedRun` of ranks that see the GPUs in `tables`, a pure function of its arguments.

    Args:
        composed: ``collect(overrides)``, if the caller has it already.

    Raises:
        ConfigFaults: all faults together.
        ConfigError: the plan does not fit the GPUs' memory.
    """
    world, composed = len(tables), composed or collect(overrides)
    try:
        facts = decide_device(composed[0].device, tables)
    except ConfigError as refused:
        raise ConfigFaults([*certain_faults(overrides, world), refused]) from refused
    return resolve_launch(overrides, world, facts, composed)


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


def _compare_with_peers(
    overrides: Sequence[str],
    place: Place,
    devices: Devices,
    assumed: Sequence[RankTable],
    run: ResolvedRun | None,
    local_faults: list[ConfigError],
    seconds: float,
) -> ResolvedRun:
    """Resolve for the GPUs that all ranks see; return once all have the same and can run it.

    Args:
        devices: what this rank sees.
        assumed: the tables from which `run` was resolved, if it was.
        local_faults: of this rank's machine.
        seconds: to wait for the slowest rank.
    """
    from moe_train.backend.consensus import reduce_through_store

    def reduced(name: str, value: Any, reduce: Callable[[list[Any]], Any]) -> Any:
        return reduce_through_store(name, value, reduce, place.rank, place.world, seconds)

    own = RankTable(place, devices.gpus, devices.problem)
    tables = [RankTable.from_mapping(one) for one in reduced("devices", own.to_mapping(), list)]
    faults = list(local_faults)
    if run is None or tables != assumed:
        try:
            run = resolve_on_devices(overrides, tables)
        except ConfigError as refused:
            faults = [refused, *local_faults]
    if run is not None and not faults and (unusable := _unusable(run.config, place, devices)):
        faults = [unusable]
    parts = [
        [one.field, one.problem, one.fix]
        for fault in faults
        for one in (fault.faults if isinstance(fault, ConfigFaults) else (fault,))
    ]
    digest = run.digest if run is not None and not faults else ""
    refusal, same = reduced("outcome", [parts, digest], compare_outcomes)
    if not refusal:
        assert run is not None
        if same:
            return run
        # The whole mapping travels only where it is needed to name the differing keys.
        refusal = reduced("mapping", run.to_mapping(), first_difference)
    # This rank's own fault keeps its cause.
    raise ConfigFaults([ConfigError(*one) for one in refusal]) from (faults[0] if faults else None)


def compare_outcomes(outcomes: Sequence[tuple[list[list[str]], str]]) -> tuple[Any, bool]:
    """The first faulty rank's faults, and whether all ranks have the same digest.

    Args:
        outcomes: (field, problem, fix) of every fault, and the digest, by rank.
    """
    by_rank = [parts for parts, _ in outcomes]
    same = len({digest for _, digest in outcomes}) == 1
    faulty = next((rank for rank, parts in enumerate(by_rank) if parts), None)
    if faulty is None:
        return [], same
    shared = all(parts == by_rank[faulty] for parts in by_rank)
    prefix = "" if shared else f"rank {faulty}: "
    return [[field, prefix + problem, fix] for field, problem, fix in by_rank[faulty]], same


def first_difference(by_rank: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The fault of the first rank whose `ResolvedRun.to_mapping` differs from rank 0's."""
    for rank, mapping in enumerate(by_rank):
        if differing := _differences(by_rank[0], mapping):
            shown = "; ".join(
                f"{key} is {theirs!r} there and {ours!r} on rank 0"
                for key, ours, theirs in differing[:SHOWN]
            )
            more = len(differing) - SHOWN
            problem = f"its config differs from rank 0's: {shown}"
            problem += f"; and {more} more keys" if more > 0 else ""
            return [[f"rank {rank}", problem, SAME_START]]
    # Other ranks wait for this result, so it is a fault whatever the mappings hold.
    return [["config", "it differs between ranks, though no key of it does", SAME_START]]


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Dotted keys of two nested mappings that differ, with both values."""
    differing: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            differing += _differences(a, b, f"{prefix}{key}.")
        # As the digest compares: 1, 1.0 and True differ, NaN equals itself.
        elif json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
            differing.append((prefix + key, a, b))
    return differing
