"""Which links a process group uses, and how long its collectives take on them.

Ring collectives and all-to-all follow Thakur, Rabenseifner and Gropp, "Optimization of collective
communication operations in MPICH" (2005): a ring all-gather or reduce-scatter of n ranks sends
(n - 1) / n of the full size from every rank; an all-to-all sends 1 / n of a rank's data to each
peer. Between nodes, the m members that a group has on a node use m ports at once (as NCCL's
parallel rings do). A ring all-reduce is one call of 2 (n - 1) turns. gloo has no reduce-scatter of
its own: torch's ProcessGroupGloo all-reduces the whole buffer and keeps a part.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from moe_train.config.hardware import HardwareConfig
from moe_train.parallel.layout import Layout


class Group(NamedTuple):
    """A process group as the network sees it."""

    kind: str
    size: int
    per_node: int
    """Members on one node (the smallest share, if nodes differ)."""

    @property
    def inside(self) -> bool:
        """Whether all members share a node."""
        return self.per_node == self.size


class Sent(NamedTuple):
    """Bytes that one rank sends in one call, by link class, and the call's seconds."""

    intra: float
    inter: float
    seconds: float


def group(layout: Layout, hardware: HardwareConfig, kind: str) -> Group:
    """The worse placed of the first and the last rank's groups of one kind."""
    return _worse(layout, hardware.devices_per_node, kind)


@lru_cache(maxsize=4096)
def _worse(layout: Layout, devices_per_node: int, kind: str) -> Group:
    results = []
    for rank in {0, layout.world - 1}:
        ranks = layout.members(kind, rank)
        nodes: dict[int, int] = {}
        for each in ranks:
            node = each // devices_per_node
            nodes[node] = nodes.get(node, 0) + 1
        results.append(Group(kind, len(ranks), min(nodes.values())))
    return min(results, key=lambda one: one.per_node)


def _rates(hardware: HardwareConfig, turns: int = 1) -> tuple[float, float, float]:
    """Bytes per second inside and between nodes, and the latency of `turns` turns in seconds."""
    share = hardware.link_efficiency * 1e9
    fast = max(hardware.intra_node_gbps * share, 1.0)
    slow = max(hardware.inter_node_gbps * share, 1.0)
    return fast, slow, (hardware.latency_us + turns * hardware.message_us) * 1e-6


def _around(hardware: HardwareConfig, where: Group, full: float, rounds: int) -> Sent:
    """One call that passes every share of `full` bytes `rounds` times around a ring."""
    if where.size == 1:
        return Sent(0.0, 0.0, 0.0)
    fast, slow, latency = _rates(hardware, rounds * (where.size - 1))
    sent = rounds * full * (where.size - 1) / where.size
    if where.inside:
        return Sent(sent, 0.0, latency + sent / fast)
    crossing = sent / where.per_node
    rate = min(fast, slow * where.per_node) if where.per_node > 1 else slow
    return Sent(sent - crossing, crossing, latency + sent / rate)


def all_gather(hardware: HardwareConfig, where: Group, full: float) -> Sent:
    """An all-gather whose unsharded size is `full` bytes."""
    return _around(hardware, where, full, 1)


def reduce_scatter(hardware: HardwareConfig, where: Group, full: float) -> Sent:
    """A reduce-scatter whose unsharded size is `full` bytes; on gloo an all-reduce."""
    return _around(hardware, where, full, 2 if hardware.kind == "cpu" else 1)


def uneven_reduce_scatter(hardware: HardwareConfig, where: Group, full: float) -> Sent:
    """A reduce-scatter of parts of different sizes; gloo all-reduces them one by one."""
    if hardware.kind != "cpu":
        return reduce_scatter(hardware, where, full)
    each = all_reduce(hardware, where, full / where.size)
    return Sent(*(where.size * value for value in each))


def all_reduce(hardware: HardwareConfig, where: Group, full: float) -> Sent:
    """A reduce-scatter and an all-gather in one call."""
    return _around(hardware, where, full, 2)


def all_to_all(hardware: HardwareConfig, where: Group, data: float) -> Sent:
    """An exchange in which each rank starts with `data` bytes, evenly addressed."""
    if where.size == 1:
        return Sent(0.0, 0.0, 0.0)
    fast, slow, latency = _rates(hardware, where.size - 1)
    intra = data * (where.per_node - 1) / where.size
    inter = data * (where.size - where.per_node) / where.size
    return Sent(intra, inter, latency + max(intra / fast, inter / slow))


def point_to_point(layout: Layout, hardware: HardwareConfig, stage: int, data: float) -> Sent:
    """A message of `data` bytes from `stage` to the next one."""
    fast, slow, latency = _rates(hardware)
    ours, theirs = (layout.stage_ranks(s)[0] for s in (stage, (stage + 1) % layout.pipeline))
    if ours // hardware.devices_per_node == theirs // hardware.devices_per_node:
        return Sent(data, 0.0, latency + data / fast)
    return Sent(0.0, data, latency + data / slow)
