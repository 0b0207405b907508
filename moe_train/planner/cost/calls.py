"""The collectives that one micro-batch makes, as Megatron-Core 0.19 calls them.

Sequence parallelism all-gathers before and reduce-scatters after each tensor-parallel pair of
products and repeats the first gather in the backward pass (Korthikanti et al., arXiv:2205.05198,
section 4.2.2). What experts exchange is in `moe_train.features.dispatchers`.

Attention over c parts of a sequence is a ring (Liu et al., arXiv:2310.01889) in TransformerEngine's
default, cp_comm_type p2p (``AttnFuncWithCPAndKVP2P``, context_parallel.py): c steps, in each of
which a rank attends to the keys and values that it has while it passes them on. In c - 1 forward
steps it sends them; in c backward steps first them, then them and the sums of their gradients in
the same dtype, last the sums, which come back to their owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moe_train.config.hardware import HardwareConfig
from moe_train.config.root import Config
from moe_train.features.dispatchers import Collective, dispatcher, reached
from moe_train.parallel.layout import Layout
from moe_train.parallel.shapes import Shapes
from moe_train.planner.cost.links import (
    Group,
    Sent,
    all_gather,
    all_reduce,
    all_to_all,
    group,
    once_a_node,
    reduce_scatter,
    ring_step,
    uneven_reduce_scatter,
)

SCORE = 4
"""Bytes of a sum of the loss or of a norm (fp32)."""

OPERATIONS: dict[str, Callable[..., Sent]] = {
    one.__name__: one
    for one in (
        all_gather,
        all_reduce,
        all_to_all,
        once_a_node,
        reduce_scatter,
        uneven_reduce_scatter,
    )
}


@dataclass(frozen=True)
class Call:
    """One kind of collective; a reduce-scatter's backward is a gather and a call of its own."""

    name: str
    kind: str
    """Group kind, as in `Layout.groups`."""
    part: str
    """Where in a pass: gather, scatter, router, dispatch, combine, embedding, head; ring and ring
    back are messages beside a forward and a backward step of attention."""
    sent: Sent
    """Of one call."""
    forward: int
    """Calls of a forward pass."""
    backward: int
    formula: str
    """Unsharded bytes, in the letters of `moe_train.parallel.shapes`."""


def sum_of(calls: Iterable[Call], direction: str, *parts: str) -> Sent:
    """All calls of one direction (``forward`` or ``backward``), of some parts or of all."""
    intra = inter = seconds = 0.0
    for call in calls:
        if not parts or call.part in parts:
            count = call.forward if direction == "forward" else call.backward
            intra += count * call.sent.intra
            inter += count * call.sent.inter
            seconds += count * call.sent.seconds
    return Sent(intra, inter, seconds)


def tensor_calls(config: Config, layout: Layout, z: Shapes) -> list[Call]:
    """Of one layer's attention, shared expert and router."""
    hardware, pairs = config.hardware, 2 if z.W else 1
    where = group(layout, hardware, "tp")
    hidden = z.A * z.H * z.b
    results = [
        Call("tensor parallel, gather", "tp", "gather", all_gather(hardware, where, hidden),
             pairs, 2 * pairs, "A H b"),
        Call("tensor parallel, scatter", "tp", "scatter", reduce_scatter(hardware, where, hidden),
             pairs, pairs, "A H b"),
    ]  # fmt: skip
    if z.qk_norm == "full":
        sums = all_reduce(hardware, where, z.A * SCORE)
        results.append(Call("QK norm, all-reduce", "tp", "gather", sums, 2, 2, "4 A"))
    router = [one for each in config.model.router.balancing_methods for one in each.collectives]
    return results + _priced(config, layout, z, router)


def ring_calls(config: Config, layout: Layout, z: Shapes) -> list[Call]:
    """Of one layer's attention over parts of a sequence; the messages of all ranks in a step."""
    if z.c == 1:
        return []
    where, steps = group(layout, config.hardware, "cp"), z.c - 1
    both = 2 * z.A * z.G * z.b
    single, double = (ring_step(config.hardware, where, size) for size in (both, 2 * both))
    again = steps if "core_attn" in config.recompute.modules else 0
    return [
        Call("ring, K and V", "cp", "ring", single, steps, again, "2 A G b"),
        Call("ring back, K and V, or dK and dV", "cp", "ring back", single, 0, 2, "2 A G b"),
        Call("ring back, K, V, dK and dV", "cp", "ring back", double, 0, steps - 1, "4 A G b"),
    ]


def expert_calls(config: Config, layout: Layout, z: Shapes) -> list[Call]:
    """Of one layer's exchange, as its dispatcher's descriptor lists them."""
    exchange = dispatcher(config.parallel.dispatcher, span=layout.span).collectives
    return _priced(config, layout, z, exchange)


def _priced(
    config: Config, layout: Layout, z: Shapes, collectives: Iterable[Collective]
) -> list[Call]:
    # Where Megatron recomputes MoE layers, it repeats the exchange; under span the schedule
    # counts that.
    again = 1 if "moe" in config.recompute.modules and not layout.span else 0
    results = []
    for one in collectives:
        where = group(layout, config.hardware, one.group)
        if not (one.unpadded and config.model.router.pad_to_capacity):
            sent = _sent(config.hardware, where, z, one)
            back = one.backward + (again * one.forward if one.part != "router" else 0)
            results.append(
                Call(one.name, one.group, one.part, sent, one.forward, back, one.formula)
            )
    return results


def _sent(hardware: HardwareConfig, where: Group, z: Shapes, one: Collective) -> Sent:
    size = one.size(z, where.size)
    if one.operation == "once_a_node":

        def share(parts: int) -> float:
            return reached(parts, z.E, z.K, z.groups, z.groups_per_token)

        return once_a_node(hardware, where, size, z.busiest, share)
    if one.routed:
        return all_to_all(hardware, where, size, z.busiest)
    return OPERATIONS[one.operation](hardware, where, size)


def end_calls(config: Config, layout: Layout, z: Shapes) -> list[Call]:
    """Of the embedding on the first stage, and of the head and its loss on the last one."""
    hardware = config.hardware
    where = group(layout, hardware, "tp")
    hidden = z.A * z.H * z.b
    gather, scatter = all_gather(hardware, where, hidden), reduce_scatter(hardware, where, hidden)
    if z.fused:
        # TransformerEngine's cross entropy gathers each rank's maximum, sum and target at once.
        size = 3 * z.A * SCORE * where.size
        loss = Call("loss, gather", "tp", "head", all_gather(hardware, where, size),
                    1, 0, "12 A t")  # fmt: skip
    else:
        loss = Call("loss, all-reduce", "tp", "head", all_reduce(hardware, where, z.A * SCORE),
                    3, 0, "4 A: maximum, target, sum")  # fmt: skip
    return [
        Call("embedding, scatter", "tp", "embedding", scatter, 1, 0, "A H b"),
        Call("embedding, gather back", "tp", "embedding", gather, 0, 1, "A H b"),
        Call("head, gather", "tp", "head", gather, 1, 1, "A H b"),
        Call("head, scatter back", "tp", "head", scatter, 0, 1, "A H b"),
        loss,
    ]
