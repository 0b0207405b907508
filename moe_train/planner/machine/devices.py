"""Which device a run takes, CPU or GPUs, from the GPUs that each rank sees.

A pure function of all ranks' tables: every rank has the same tables, so every rank decides the
same. A node must have as many GPUs as local ranks, or none; anything between is refused on all
ranks, so that no run leaves GPUs idle or trains partly on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from moe_train.backend.cuda.devices import Devices, Gpu
from moe_train.config.hardware import MachineFacts
from moe_train.errors import ConfigError

FIELD = "device"
CPU_FIX = "device=cpu to train on the CPU"
UNEVEN = 0.02
"""Share by which the memory of GPUs of one kind may differ without a warning."""


@dataclass(frozen=True)
class Place:
    """Rank, world size, local rank and local world size, from the launcher's environment."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @property
    def alone(self) -> bool:
        """Whether all ranks are on one node."""
        return self.local_world >= self.world


def place_of(environment: Mapping[str, str] | None = None) -> Place:
    """The place of this process: torchrun's variables; one node without them."""
    variables = os.environ if environment is None else environment
    rank, world = int(variables.get("RANK", "0")), int(variables.get("WORLD_SIZE", "1"))
    local_world = int(variables.get("LOCAL_WORLD_SIZE", "0")) or world
    local_rank = int(variables.get("LOCAL_RANK", rank % local_world))
    return Place(rank, world, local_rank, local_world)


@dataclass(frozen=True)
class RankTable:
    """The GPUs that one rank sees."""

    place: Place
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    """Why the list may be wrong; empty if it is right."""

    @property
    def node(self) -> int:
        """Lowest rank of the rank's node: launchers number a node's ranks in a row."""
        return self.place.rank - self.place.local_rank

    def to_mapping(self) -> dict[str, Any]:
        """Plain data, to be exchanged as JSON."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> RankTable:
        """The table that `to_mapping` gave."""
        gpus = tuple(Gpu(**gpu) for gpu in content["gpus"])
        return cls(Place(**content["place"]), gpus, content["problem"])


@dataclass(frozen=True)
class _Node:
    """The ranks of a node and the GPUs that they see."""

    number: int
    tables: tuple[RankTable, ...]

    @property
    def ranks(self) -> str:
        first, last = self.tables[0].place.rank, self.tables[-1].place.rank
        return f"rank {first}" if first == last else f"ranks {first}-{last}"

    @property
    def shared(self) -> bool:
        """Whether every rank sees the same list, of which it takes the GPU of its local rank."""
        return len({table.gpus for table in self.tables}) == 1

    @property
    def private(self) -> bool:
        """Whether each rank sees one GPU, its own (Slurm's --gpus-per-task)."""
        seen = [table.gpus for table in self.tables]
        return all(len(gpus) == 1 for gpus in seen) and len(set(seen)) == len(seen)

    @property
    def gpus(self) -> list[Gpu]:
        """Every GPU that a rank of this node sees, once."""
        return list(dict.fromkeys(gpu for table in self.tables for gpu in table.gpus))

    @property
    def used(self) -> list[Gpu]:
        """The GPUs that its ranks would use."""
        return self.gpus if self.private else list(self.tables[0].gpus[: len(self.tables)])

    def fault(self) -> str:
        """Why the ranks of this node cannot have a GPU each; empty if they can."""
        if self.private or (self.shared and len(self.gpus) >= len(self.tables)):
            return ""
        where = f"node {self.number} ({self.ranks})"
        if not self.shared:
            names = {
                table.place.rank: ", ".join(gpu.uuid for gpu in table.gpus) or "none"
                for table in self.tables[:8]
            }
            views = "; ".join(f"rank {rank} sees {seen}" for rank, seen in names.items())
            return f"{where} shows its ranks different GPUs: {views}"
        count = len(self.gpus)
        each = f"{count} GPU{'s' * (count != 1)} for {len(self.tables)} ranks"
        return f"{where} has {each if count else 'no GPU'}"


def nodes_of(tables: Sequence[RankTable]) -> list[_Node]:
    """The tables by node, in rank order."""
    ordered = sorted(tables, key=lambda table: table.place.rank)
    grouped = groupby(ordered, key=lambda table: table.node)
    return [_Node(number, tuple(group)) for number, (_, group) in enumerate(grouped)]


def decide_device(wanted: str, tables: Sequence[RankTable]) -> MachineFacts:
    """Choose the device of all ranks.

    Args:
        wanted: ``device`` of the config: auto, cpu or cuda.
        tables: of every rank.

    Raises:
        ConfigError: the ranks cannot all have the same kind of device.
    """
    nodes = nodes_of(tables)
    most = max(len(node.tables) for node in nodes)
    if wanted == "cpu":
        return MachineFacts("cpu", len(tables), 0.0, per_node=most)
    with_gpus = [node for node in nodes if node.gpus]
    problems = list(dict.fromkeys(table.problem for table in tables if table.problem))
    if not with_gpus:
        if wanted == "cuda":
            raise ConfigError(
                FIELD,
                "device=cuda, but this machine shows no usable GPU" + _reasons(problems),
                "device=cpu runs the same program on gloo; device=auto picks what is there",
            )
        notes = tuple(f"training on the CPU: {problem}" for problem in problems)
        return MachineFacts("cpu", len(tables), 0.0, per_node=most, notes=notes)
    faults = [fault for node in nodes if (fault := node.fault())]
    if faults:
        raise ConfigError(FIELD, "; ".join(faults) + _reasons(problems), _fix(nodes, with_gpus))
    return _gpus(nodes, most, problems)


def _reasons(problems: Sequence[str]) -> str:
    return f" ({'; '.join(problems)})" if problems else ""


def _fix(nodes: Sequence[_Node], with_gpus: Sequence[_Node]) -> str:
    """The fix of a refusal."""
    if any(not node.shared and not node.private for node in nodes):
        return f"show all ranks of a node the same CUDA_VISIBLE_DEVICES, or one each; or {CPU_FIX}"
    fewest = min(len(node.gpus) for node in with_gpus)
    start = f"start as many ranks as GPUs (--nproc-per-node {fewest}, NPROC={fewest})"
    if len(with_gpus) < len(nodes):
        start = "start without the nodes that have no GPU, or repair them"
        if any(0 < len(node.gpus) < len(node.tables) for node in nodes):
            start += f", and start at most {fewest} ranks a node"
    return f"{start}, or {CPU_FIX}"


def _gpus(nodes: Sequence[_Node], most: int, problems: Sequence[str]) -> MachineFacts:
    used = [gpu for node in nodes for gpu in node.used]
    smallest, largest = (extreme(gpu.memory_gb for gpu in used) for extreme in (min, max))
    kinds = _kinds(used)
    notes = [*problems]
    if len(kinds) > 1:
        named = ", ".join(name or "unnamed" for name, _ in kinds)
        notes.append(f"GPUs of different kinds: {named}; the slowest sets the pace")
    if largest > smallest * (1 + UNEVEN):
        notes.append(f"GPUs have {smallest:.1f} to {largest:.1f} GB: the smallest decides")
    idle = sum(len(node.gpus) - len(node.used) for node in nodes)
    if idle:
        notes.append(
            f"{idle} GPU{'s' * (idle > 1)} of the ranks' nodes stay{'s' * (idle == 1)} idle: "
            "torchrun --nproc-per-node N starts more ranks"
        )
    world = sum(len(node.tables) for node in nodes)
    return MachineFacts("gpu", world, smallest, kinds, most, tuple(notes))


def _kinds(gpus: Sequence[Gpu]) -> tuple[tuple[str, float], ...]:
    """Names of the kinds of GPUs, and the smallest memory of each in GB."""
    smallest: dict[str, float] = {}
    for gpu in gpus:
        smallest[gpu.name] = min(gpu.memory_gb, smallest.get(gpu.name, gpu.memory_gb))
    return tuple(sorted(smallest.items()))


def local_facts(devices: Devices, world: int) -> MachineFacts:
    """Facts for ``world`` ranks on machines like this one."""
    gpus = devices.gpus
    if not gpus:
        return MachineFacts("cpu", world, 0.0, per_node=world)
    smallest = min(gpu.memory_gb for gpu in gpus)
    return MachineFacts("gpu", world, smallest, _kinds(gpus), min(world, len(gpus)))
