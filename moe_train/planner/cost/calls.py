"""The collectives that one micro-batch makes, as Megatron-Core 0.19 calls them.

Sequence parallelism all-gathers before and reduce-scatters after each tensor-parallel pair of
products and repeats the first gather in the backward pass (Korthikanti et al., arXiv:2205.05198,
section 4.2.2). Expert parallelism exchanges tokens twice forward and twice backward (GShard,
arXiv:2006.16668); Megatron's all-to-all dispatcher sends the probabilities apart and first gathers
everyone's counts. The spanning exchange packs rows with their probabilities (model/span/exchange).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.root import Config
from moe_train.parallel.layout import Layout
from moe_train.parallel.shapes import Shapes
from moe_train.planner.cost.links import (
    Sent,
    all_gather,
    all_reduce,
    all_to_all,
    group,
    reduce_scatter,
    uneven_reduce_scatter,
)

COUNT, PROBABILITY, SCORE = 8, 4, 4
"""Bytes of a row count (int64), of a routing probability and of a loss term (fp32)."""


@dataclass(frozen=True)
class Call:
    """One kind of collective; a reduce-scatter's backward is a gather and a call of its own."""

    name: str
    kind: str
    """Group kind, as in `Layout.groups`."""
    part: str
    """Where in a pass: gather, scatter, router, dispatch, combine, embedding, head."""
    sent: Sent
    """Of one call."""
    forward: int
    """Calls of a forward pass."""
    backward: int
    formula: str
    """Unsharded bytes, in the letters of `moe_train.parallel.shapes`."""


def sum_of(calls: list[Call], direction: str, *parts: str) -> Sent:
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
    found = [
        Call("tensor parallel, gather", "tp", "gather", all_gather(hardware, where, hidden),
             pairs, 2 * pairs, "A H b"),
        Call("tensor parallel, scatter", "tp", "scatter", reduce_scatter(hardware, where, hidden),
             pairs, pairs, "A H b"),
    ]  # fmt: skip
    # Each loss sums the tokens of every expert over the ranks that share its tokens.
    kind = {"aux": "tp_cp", "seq_aux": "tp_cp", "global_aux": "tp_dp_cp"}.get(
        config.model.router.balancing
    )
    if kind:
        where = group(layout, hardware, kind)
        sequences = config.batch.micro if config.model.router.balancing == "seq_aux" else 1
        size = z.E * SCORE * sequences
        found.append(Call("auxiliary loss, all-reduce", kind, "router",
                          all_reduce(hardware, where, size), 1, 0, "4 E"))  # fmt: skip
    return found


def expert_calls(config: Config, layout: Layout, z: Shapes) -> list[Call]:
    """Of one layer's exchange."""
    if layout.span:
        return _span(config, layout, z)
    if config.parallel.dispatcher == "allgather":
        return _gathered(config, layout, z)
    hardware, row, rows = config.hardware, z.H * z.b, z.N * z.K
    ep = group(layout, hardware, "ep")
    found = []
    if config.parallel.dispatcher == "alltoall":
        if not config.model.router.pad_to_capacity:
            where = group(layout, hardware, "tp_ep")
            size = where.size * z.E * COUNT
            found.append(Call("experts, counts", "tp_ep", "dispatch",
                              all_gather(hardware, where, size), 1, 0, "8 E e x"))  # fmt: skip
        found += [
            Call("experts, rows out", "ep", "dispatch", all_to_all(hardware, ep, rows * row),
                 1, 1, "N K H b"),
            Call("experts, probabilities", "ep", "dispatch",
                 all_to_all(hardware, ep, rows * PROBABILITY), 1, 1, "4 N K"),
        ]  # fmt: skip
    else:
        # DeepEP's one kernel takes both and counts by itself.
        found.append(Call("experts, rows out", "ep", "dispatch",
                          all_to_all(hardware, ep, rows * (row + PROBABILITY)),
                          1, 1, "N K (H b + 4)"))  # fmt: skip
    found.append(Call("experts, rows back", "ep", "combine", all_to_all(hardware, ep, rows * row),
                      1, 1, "N K H b"))  # fmt: skip
    if layout.expert_tensor > 1:
        found += _expert_tensor(config, layout, z)
    return found


def _expert_tensor(config: Config, layout: Layout, z: Shapes) -> list[Call]:
    """Rows, as many as were routed, are shared by the ranks that hold parts of the same experts."""
    hardware, size = config.hardware, z.R * z.H * z.b
    where = group(layout, hardware, "etp")
    gather = all_gather(hardware, where, size)
    scatter = uneven_reduce_scatter(hardware, where, size)
    name, thin = "expert tensor parallel", z.R * PROBABILITY
    return [
        Call(f"{name}, gather", "etp", "dispatch", gather, 1, 0, "R H b"),
        Call(f"{name}, scatter back", "etp", "dispatch", scatter, 0, 1, "R H b"),
        Call(f"{name}, probabilities", "etp", "dispatch", all_gather(hardware, where, thin),
             1, 0, "4 R"),
        Call(f"{name}, probabilities back", "etp", "dispatch",
             uneven_reduce_scatter(hardware, where, thin), 0, 1, "4 R"),
        Call(f"{name}, scatter", "etp", "combine", scatter, 1, 0, "R H b"),
        Call(f"{name}, gather back", "etp", "combine", gather, 0, 1, "R H b"),
    ]  # fmt: skip


def _gathered(config: Config, layout: Layout, z: Shapes) -> list[Call]:
    """Every rank gets all tokens of the group, and adds its experts' results up."""
    hardware = config.hardware
    where = group(layout, hardware, "tp_ep")
    tokens = z.N * where.size

    def gather(size: float) -> Sent:
        return all_gather(hardware, where, size)

    def scatter(size: float) -> Sent:
        return reduce_scatter(hardware, where, size)

    rows, scores, name = tokens * z.H * z.b, tokens * z.E * PROBABILITY, "experts"
    return [
        Call(f"{name}, routing map", "tp_ep", "dispatch", gather(tokens * z.E), 1, 0, "N e x E"),
        Call(f"{name}, probabilities", "tp_ep", "dispatch", gather(scores), 1, 0, "4 N e x E"),
        Call(f"{name}, tokens", "tp_ep", "dispatch", gather(rows), 1, 0, "N e x H b"),
        Call(f"{name}, probabilities back", "tp_ep", "dispatch", scatter(scores),
             0, 1, "4 N e x E"),
        Call(f"{name}, tokens back", "tp_ep", "dispatch", scatter(rows), 0, 1, "N e x H b"),
        Call(f"{name}, results", "tp_ep", "combine", scatter(rows), 1, 0, "N e x H b"),
        Call(f"{name}, results back", "tp_ep", "combine", gather(rows), 0, 1, "N e x H b"),
    ]  # fmt: skip


def _span(config: Config, layout: Layout, z: Shapes) -> list[Call]:
    """Both sides know the counts by the time of the backward pass."""
    hardware, row, rows = config.hardware, z.H * z.b, z.N * z.K
    where = group(layout, hardware, "ep")
    packed = all_to_all(hardware, where, rows * z.packed_row)
    return [
        Call("experts, counts", "ep", "dispatch", all_to_all(hardware, where, z.E * COUNT),
             1, 0, "8 E"),
        Call("experts, rows and probabilities", "ep", "dispatch", packed, 1, 1,
             "N K (H b + 4), rows in multiples of 16"),
        Call("experts, results", "ep", "combine", all_to_all(hardware, where, rows * row),
             1, 1, "N K H b"),
    ]  # fmt: skip


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
