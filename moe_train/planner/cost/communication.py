"""Every collective of a training step: which group, how many bytes on which links, how long.

Per rank. A micro-batch's are in `moe_train.planner.cost.calls`; the distributed optimizer
reduce-scatters gradients and all-gathers weights (ZeRO-1, arXiv:1910.02054).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.root import Config
from moe_train.parallel.layout import Layout
from moe_train.parallel.optimizer_state import bytes_per_parameter
from moe_train.parallel.parameters import RankParameters
from moe_train.parallel.shapes import Shapes
from moe_train.planner.cost.calls import (
    end_calls,
    expert_calls,
    ring_calls,
    sum_of,
    tensor_calls,
)
from moe_train.planner.cost.links import (
    Sent,
    all_gather,
    all_reduce,
    group,
    point_to_point,
    reduce_scatter,
)
from moe_train.planner.plan import Plan

LEAST_EXPOSED = 0.1
"""Share of gradient and weight traffic that overlap cannot hide: assumed."""


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
    """Of the step."""
    intra_bytes: float
    inter_bytes: float
    seconds: float
    formula: str
    """Unsharded bytes of a call."""


def layer_traffic(config: Config, layout: Layout, z: Shapes) -> LayerTraffic:
    """Collectives inside one layer, without recomputation's repeats."""
    tensor, expert = tensor_calls(config, layout, z), expert_calls(config, layout, z)
    return LayerTraffic(
        sum_of(tensor, "forward"),
        sum_of(tensor, "backward"),
        sum_of(expert, "forward"),
        sum_of(expert, "backward"),
    )


def gradient_traffic(
    config: Config, layout: Layout, held: RankParameters
) -> list[tuple[str, str, Sent]]:
    """(name, group kind, sent) of the gradient reduction and weight gather of one step."""
    hardware, optim = config.hardware, config.optim
    each = bytes_per_parameter(config.dtype, optim)
    results = []
    for name, kind, count in (
        ("dense", "dp_cp", held.dense),
        ("expert", "edp", held.experts),
    ):
        where = group(layout, hardware, kind)
        if optim.distributed:
            results.append((f"{name} gradients, reduce-scatter", kind,
                          reduce_scatter(hardware, where, count * each.gradient)))  # fmt: skip
            results.append((f"{name} weights, all-gather", kind,
                          all_gather(hardware, where, count * each.weight)))  # fmt: skip
        else:
            results.append((f"{name} gradients, all-reduce", kind,
                          all_reduce(hardware, where, count * each.gradient)))  # fmt: skip
    where = group(layout, hardware, "tp")
    sent = all_reduce(hardware, where, held.replicated * each.gradient)
    results.append(("norm and router gradients, all-reduce", "tp", sent))
    return results


def step_traffic(plan: Plan, stage: int) -> list[Traffic]:
    """All traffic of one step on a rank of `stage`."""
    config, layout, z, count = plan.config, plan.layout, plan.shapes, plan.microbatches
    numbers = layout.stage_layers(stage)
    layers, recomputed = len(numbers), len(config.recomputed_layers.intersection(numbers))
    hardware, last = config.hardware, stage == layout.pipeline - 1
    # Per micro-batch: (call, forward passes, backward passes) through what makes it.
    dense = [*tensor_calls(config, layout, z), *ring_calls(config, layout, z)]
    passes = [(call, layers + recomputed, layers) for call in dense]
    again = 0 if layout.span else recomputed
    passes += [(call, layers + again, layers) for call in expert_calls(config, layout, z)]
    for call in end_calls(config, layout, z):
        here = stage == 0 if call.part == "embedding" else last
        passes.append((call, int(here), int(here)))
    traffic = []
    for call, ahead, back in passes:
        each = ahead * call.forward + back * call.backward
        # Stages without a micro-batch take part in a spanning exchange as well; rows are sent in
        # as many slots as there are micro-batches.
        slots = count
        if layout.span and call.kind == "ep":
            slots += layout.pipeline - 1
        traffic.append(
            Traffic(
                call.name,
                call.kind,
                group(layout, hardware, call.kind).size,
                each * slots,
                call.sent.intra * each * count,
                call.sent.inter * each * count,
                call.sent.seconds * each * slots,
                call.formula,
            )  # fmt: skip
        )
    if layout.pipeline > 1:
        chunks = layout.virtual_pipeline
        message = point_to_point(layout, hardware, min(stage, layout.pipeline - 2)
                                 if chunks == 1 else stage, z.N * z.H * z.b)  # fmt: skip
        ways = count * (chunks - 1 + (not last) + chunks - 1 + (stage > 0))
        traffic.append(Traffic("pipeline messages", "pp", group(layout, hardware, "pp").size, ways,
                             *_times(message, ways), "N H b"))  # fmt: skip
    for name, kind, sent in gradient_traffic(config, layout, plan.parameters(stage)):
        size = group(layout, hardware, kind).size
        traffic.append(Traffic(name, kind, size, 1, *sent, "the buffer"))
    return [one for one in traffic if one.size > 1 and one.calls]


def _times(sent: Sent, count: int) -> Sent:
    return Sent(sent.intra * count, sent.inter * count, sent.seconds * count)
