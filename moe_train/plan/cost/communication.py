"""Every collective of a training step: which group, how many bytes on which links, how long.

Per rank. Sequence parallelism all-gathers before and reduce-scatters after each tensor-parallel
pair of products and repeats the first gather in the backward pass (Korthikanti et al.,
arXiv:2205.05198, section 4.2.2); expert parallelism exchanges tokens twice forward and twice
backward (GShard, arXiv:2006.16668); the distributed optimizer reduce-scatters gradients and
all-gathers weights (ZeRO-1, arXiv:1910.02054).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.root import Config
from moe_train.plan.cost.links import (
    Sent,
    all_reduce,
    all_to_all,
    group,
    point_to_point,
    ring,
)
from moe_train.plan.layouts.layout import Layout
from moe_train.plan.memory.optimizer_bytes import bytes_per_parameter
from moe_train.plan.quantities.parameters import RankParameters
from moe_train.plan.quantities.shapes import Shapes


@dataclass(frozen=True)
class LayerTraffic:
    """Seconds and bytes of one layer's collectives for one micro-batch."""

    tensor_forward: Sent
    tensor_backward: Sent
    expert_forward: Sent
    expert_backward: Sent


@dataclass(frozen=True)
class Traffic:
    """One kind of traffic over a whole step on one rank."""

    name: str
    kind: str
    """Group kind, as in `Layout.groups`."""
    size: int
    calls: int
    intra_bytes: float
    inter_bytes: float
    seconds: float
    formula: str


def _add(*parts: Sent) -> Sent:
    return Sent(*(sum(values) for values in zip(*parts, strict=True)))


def times(sent: Sent, count: float) -> Sent:
    """`count` calls."""
    return Sent(sent.intra * count, sent.inter * count, sent.seconds * count)


def layer_traffic(config: Config, layout: Layout, z: Shapes) -> LayerTraffic:
    """Collectives inside one layer, without recomputation's repeats."""
    hardware = config.hardware
    pair = ring(hardware, group(layout, hardware, "tp"), z.A * z.H * z.b)
    pairs = 2 if z.W else 1
    row = z.H * z.b
    if config.parallel.dispatcher == "allgather" and not layout.span:
        where = group(layout, hardware, "tp_ep")
        forward = times(ring(hardware, where, z.N * where.size * row), 2)
    else:
        where = group(layout, hardware, "ep")
        out = all_to_all(hardware, where, z.N * z.K * (row + 4))
        forward = _add(out, all_to_all(hardware, where, z.N * z.K * row))
        if layout.expert_tensor > 1:
            gather = ring(hardware, group(layout, hardware, "etp"), z.R * row)
            forward = _add(forward, gather, gather)
    return LayerTraffic(times(pair, 2 * pairs), times(pair, 3 * pairs), forward, forward)


def gradient_traffic(
    config: Config, layout: Layout, held: RankParameters
) -> list[tuple[str, str, Sent]]:
    """(name, group kind, sent) of the gradient reduction and weight gather of one step."""
    hardware, optim = config.hardware, config.optim
    each = bytes_per_parameter(config.dtype, optim)
    found = []
    for name, kind, count in (
        ("dense", "dp_cp", held.dense),
        ("expert", "edp", held.experts),
    ):
        where = group(layout, hardware, kind)
        if optim.distributed:
            found.append((f"{name} gradients, reduce-scatter", kind,
                          ring(hardware, where, count * each.gradient)))  # fmt: skip
            found.append((f"{name} weights, all-gather", kind,
                          ring(hardware, where, count * each.weight)))  # fmt: skip
        else:
            found.append((f"{name} gradients, all-reduce", kind,
                          all_reduce(hardware, where, count * each.gradient)))  # fmt: skip
    where = group(layout, hardware, "tp")
    sent = all_reduce(hardware, where, held.replicated * each.gradient)
    found.append(("norm and router gradients, all-reduce", "tp", sent))
    return found


def step_traffic(
    config: Config, layout: Layout, z: Shapes, held: RankParameters, stage: int, count: int,
    recomputed: int,
) -> list[Traffic]:  # fmt: skip
    """All traffic of one step on a rank of `stage`.

    Args:
        count: micro-batches per step.
        recomputed: of the stage's layers, those that run forward twice.
    """
    hardware, layers = config.hardware, len(layout.stage_layers(stage))
    layer = layer_traffic(config, layout, z)
    again = 0 if layout.span else recomputed
    kinds = [
        ("tensor parallel, gather and scatter", "tp",
         _add(times(layer.tensor_forward, layers + recomputed),
              times(layer.tensor_backward, layers)),
         "A H b (t-1)/t: 2 forward, 3 backward a layer", 5 * layers),
        ("experts, exchange", "ep",
         _add(times(layer.expert_forward, layers + again), times(layer.expert_backward, layers)),
         "N K H b (e-1)/e: 2 forward, 2 backward a layer", 4 * layers),
    ]  # fmt: skip
    if layout.pipeline > 1:
        chunks = layout.virtual_pipeline
        last = stage == layout.pipeline - 1
        message = point_to_point(layout, hardware, min(stage, layout.pipeline - 2)
                                 if chunks == 1 else stage, z.N * z.H * z.b)  # fmt: skip
        ways = chunks - 1 + (not last) + chunks - 1 + (stage > 0)
        kinds.append(("pipeline messages", "pp", times(message, ways), "N H b", ways))
    found = [
        Traffic(name, kind, group(layout, hardware, kind).size, calls * count,
                sent.intra * count, sent.inter * count, sent.seconds * count, formula)
        for name, kind, sent, formula, calls in kinds
    ]  # fmt: skip
    for name, kind, sent in gradient_traffic(config, layout, held):
        size = group(layout, hardware, kind).size
        found.append(Traffic(name, kind, size, 1, *sent, "(n-1)/n of the buffer"))
    return [one for one in found if one.size > 1]
