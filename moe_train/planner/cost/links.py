"""Which links a process group uses, and how long its collectives take on them.

Ring collectives and all-to-all follow Thakur, Rabenseifner and Gropp, "Optimization of collective
communication operations in MPICH" (2005): a ring all-gather or reduce-scatter of n ranks sends
(n - 1) / n of the full size from every rank; an all-to-all sends 1 / n of a rank's data to each
peer. Between nodes, the m members that a group has on a node use m ports at once (as NCCL's
parallel rings do). A ring all-reduce is one call of 2 (n - 1) turns. gloo has no reduce-scatter of
its own: torch's ProcessGroupGloo all-reduces the whole buffer and keeps a part.

A link's bandwidth saturates with the size m of what it sends to one peer at once, as
m / (m + half) (Hockney's model, "The communication challenge for MPP", 1994, with half the message
that reaches half of the bandwidth). So every turn costs `half` bytes more.

Where pairs of devices have links of their own, rings and exchanges of a node's k members use k - 1
of them at once, and a pair its own alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from math import lcm, prod
from typing import NamedTuple

from moe_train.config.hardware import HardwareConfig
from moe_train.parallel.layout import Layout
from moe_train.planner.cost.constants import constants


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
    return _worse(kind, layout.steps(kind), layout.world - 1, hardware.fast_devices)


@lru_cache(maxsize=1 << 16)
def _worse(kind: str, steps: tuple[tuple[int, int], ...], last: int, node: int) -> Group:
    placed = min(_fewest(steps, rank, node) for rank in {0, last})
    return Group(kind, prod(size for _, size in steps), placed)


def _fewest(steps: tuple[tuple[int, int], ...], rank: int, node: int) -> int:
    """Least members that one node of `node` devices has of `rank`'s group."""
    first = rank - sum(rank // stride % size * stride for stride, size in steps)
    merged: list[tuple[int, int]] = [(1, 1)]
    for stride, size in steps:
        inner, count = merged[-1]
        if stride == inner * count:
            merged[-1] = (inner, count * size)
        elif size > 1:
            merged.append((stride, size))
    # Along the slowest axis the shares of nodes repeat: some periods show them all.
    stride, size = merged[-1]
    period = lcm(stride, node) // stride
    merged[-1] = (stride, size if size < 5 * period else size % period + 4 * period)
    members = product(*(range(0, stride * size, stride) for stride, size in merged))
    return min(Counter((first + sum(offsets)) // node for offsets in members).values())


class _Rates(NamedTuple):
    """Bytes per second of a rank, and the bytes that every turn costs more."""

    fast: float
    slow: float
    half_fast: float
    half_slow: float


def _rates(hardware: HardwareConfig, members: int) -> _Rates:
    """Of a rank whose group has `members` ranks on a node."""
    share = hardware.link_efficiency * 1e9
    at_once = max(members - 1, 1) if hardware.paired_links else 1
    return _Rates(
        max(hardware.intra_node_gbps * share * at_once, 1.0),
        max(hardware.inter_node_gbps * share, 1.0),
        1e3 * hardware.intra_message_kb,
        1e3 * hardware.inter_message_kb,
    )


def _latency(hardware: HardwareConfig, turns: int = 1) -> float:
    return (hardware.latency_us + turns * hardware.message_us) * 1e-6


def _around(hardware: HardwareConfig, where: Group, full: float, rounds: int) -> Sent:
    """One call that passes every share of `full` bytes `rounds` times around a ring."""
    if where.size == 1:
        return Sent(0.0, 0.0, 0.0)
    rates, turns = _rates(hardware, where.per_node), rounds * (where.size - 1)
    latency = _latency(hardware, turns)
    sent = rounds * full * (where.size - 1) / where.size
    if where.inside:
        return Sent(sent, 0.0, latency + (sent + turns * rates.half_fast) / rates.fast)
    crossing = sent / where.per_node
    rate = min(rates.fast, rates.slow * where.per_node) if where.per_node > 1 else rates.slow
    seconds = latency + sent / rate + turns * rates.half_slow / rates.slow
    return Sent(sent - crossing, crossing, seconds)


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


def all_to_all(hardware: HardwareConfig, where: Group, data: float, busiest: float = 1.0) -> Sent:
    """An exchange in which each rank starts with `data` bytes.

    Args:
        busiest: bytes that the busiest rank receives over the average; all wait for it.
    """
    if where.size == 1:
        return Sent(0.0, 0.0, 0.0)
    intra = data * (where.per_node - 1) / where.size
    inter = data * (where.size - where.per_node) / where.size
    return _exchanged(hardware, where, intra, inter, busiest)


def once_a_node(
    hardware: HardwareConfig,
    where: Group,
    data: float,
    busiest: float,
    reached: Callable[[int], float],
) -> Sent:
    """An exchange that sends a row once to each node, which passes it on to its ranks.

    DeepEP's and HybridEP's (github.com/deepseek-ai/DeepEP): rows cross to the device of the same
    place on the other node, and go on over fast links to the ranks that have experts of theirs.

    Args:
        data: bytes of a rank's rows, each counted once.
        busiest: as in `all_to_all`.
        reached: share of rows with an expert among one of so many equal parts of all experts.
    """
    if where.size == 1:
        return Sent(0.0, 0.0, 0.0)
    nodes = where.size // where.per_node
    inter = data * (nodes - 1) * reached(nodes)
    intra = data * nodes * (where.per_node - 1) * reached(where.size)
    return _exchanged(hardware, where, intra, inter, busiest)


def _exchanged(
    hardware: HardwareConfig, where: Group, intra: float, inter: float, busiest: float
) -> Sent:
    rates, share = _rates(hardware, where.per_node), constants(hardware).exchange
    inside, outside = where.per_node - 1, where.size - where.per_node
    seconds = max(
        (busiest * intra / share + inside * rates.half_fast) / rates.fast,
        (busiest * inter / share + outside * rates.half_slow) / rates.slow,
    )
    return Sent(intra, inter, _latency(hardware, where.size - 1) + seconds)


def point_to_point(layout: Layout, hardware: HardwareConfig, stage: int, data: float) -> Sent:
    """A message of `data` bytes from `stage` to the next one."""
    ours, theirs = (layout.stage_ranks(s)[0] for s in (stage, (stage + 1) % layout.pipeline))
    inside = ours // hardware.fast_devices == theirs // hardware.fast_devices
    seconds = _message(hardware, data, inside)
    return Sent(data, 0.0, seconds) if inside else Sent(0.0, data, seconds)


def ring_step(hardware: HardwareConfig, where: Group, data: float) -> Sent:
    """A message of `data` bytes from every rank to the next one of its group, all at once.

    A pair has one port, unlike the rings of a collective; where one of them crosses nodes, all wait
    for it. Of a node's members one sends across.
    """
    if where.size == 1:
        return Sent(0.0, 0.0, 0.0)
    crossing = 0.0 if where.inside else data / where.per_node
    return Sent(data - crossing, crossing, _message(hardware, data, where.inside))


def _message(hardware: HardwareConfig, data: float, inside: bool) -> float:
    rates, latency = _rates(hardware, 2), _latency(hardware)
    if inside:
        return latency + (data + rates.half_fast) / rates.fast
    return latency + (data + rates.half_slow) / rates.slow
