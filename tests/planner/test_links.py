"""Links and the groups on them: each formula against a count of its own."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from math import lcm

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config.hardware import HardwareConfig
from moe_train.features.dispatchers import reached
from moe_train.parallel.layout import GROUPS, Layout
from moe_train.planner.cost.links import (
    Group,
    all_gather,
    all_reduce,
    all_to_all,
    group,
    once_a_node,
    point_to_point,
    reduce_scatter,
    uneven_reduce_scatter,
)

LAYOUTS = st.sampled_from(
    [
        Layout(8, 2, 4, 1, 1, 2, 1, "stage", 16, 64),
        Layout(8, 2, 4, 1, 1, 8, 1, "span", 16, 64),
        Layout(16, 2, 4, 1, 1, 8, 1, "span", 16, 64),
        Layout(32, 2, 4, 1, 1, 8, 1, "stage", 16, 64),
        Layout(32, 2, 2, 1, 2, 2, 2, "stage", 16, 64),
        Layout(24, 3, 2, 1, 1, 4, 1, "stage", 16, 64),
    ]
)


@settings(deadline=None)
@given(LAYOUTS, st.data())
def test_members_are_the_layouts_groups(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world - 1))
    for kind in ("tp", "cp", "tp_cp", "dp_cp", "tp_dp_cp", "pp", "mp", "etp", "ep", "tp_ep", "edp"):
        (theirs,) = [ranks for ranks in layout.groups(kind) if rank in ranks]
        assert layout.members(kind, rank) == theirs, kind


@given(
    size=st.sampled_from([2, 4, 8, 16]),
    per_node=st.sampled_from([1, 2, 4, 8]),
    data=st.floats(1e3, 1e9),
)
def test_exchanges_equal_a_count_over_pairs(size: int, per_node: int, data: float) -> None:
    per_node = min(per_node, size)
    hardware = HardwareConfig(
        intra_node_gbps=100, inter_node_gbps=10, link_efficiency=1.0, latency_us=0
    )
    where = Group("ep", size, per_node)
    sent = all_to_all(hardware, where, data)
    peers = range(1, size)
    assert sent.intra == pytest.approx(sum(data / size for p in peers if p < per_node))
    assert sent.inter == pytest.approx(sum(data / size for p in peers if p >= per_node))
    assert sent.seconds == pytest.approx(max(sent.intra / 100e9, sent.inter / 10e9))
    around = all_gather(hardware, where, data)
    # A ring passes n - 1 blocks of 1/n, over every edge.
    assert around.intra + around.inter == pytest.approx(data * (size - 1) / size)
    # Twice around in one call; gloo's reduce-scatter is that, others' once around.
    twice = all_reduce(hardware, where, data)
    assert twice == pytest.approx([2 * each for each in around])
    assert reduce_scatter(hardware, where, data) == twice
    accelerator = dataclasses.replace(hardware, kind="accelerator")
    assert reduce_scatter(accelerator, where, data) == around
    crossing = (size // per_node) * (0 if where.inside else 1)
    assert around.inter * size == pytest.approx(data * (size - 1) / size * crossing)


def test_calls_pay_their_latency_once() -> None:
    hardware = HardwareConfig(intra_node_gbps=1e6, latency_us=100, message_us=10)
    where = Group("tp", 4, 4)
    for call, turns in ((all_gather, 3), (reduce_scatter, 6), (all_reduce, 6), (all_to_all, 3)):
        assert call(hardware, where, 8.0).seconds == pytest.approx(1e-6 * (100 + 10 * turns))


def test_gloo_scatters_uneven_parts_one_by_one() -> None:
    where = Group("etp", 4, 4)
    host = HardwareConfig(kind="cpu", latency_us=100)
    parts = uneven_reduce_scatter(host, where, 8e6)
    assert parts.intra == pytest.approx(reduce_scatter(host, where, 8e6).intra)
    assert parts.seconds == pytest.approx(reduce_scatter(host, where, 8e6).seconds + 3 * 100e-6)
    nccl = dataclasses.replace(host, kind="accelerator")
    assert uneven_reduce_scatter(nccl, where, 8e6) == reduce_scatter(nccl, where, 8e6)


@pytest.mark.parametrize(
    ("parts", "experts", "chosen", "groups", "taken"),
    [(4, 128, 8, 0, 0), (16, 128, 8, 0, 0), (8, 8, 2, 0, 0), (8, 256, 8, 8, 4), (4, 256, 8, 8, 4),
     (64, 256, 8, 8, 4)],
)  # fmt: skip
def test_parts_that_tokens_reach(
    parts: int, experts: int, chosen: int, groups: int, taken: int
) -> None:
    """The hypergeometric share against draws of experts."""
    draw, hits, tokens = random.Random(0), 0, 4000
    every = list(range(experts))
    for _ in range(tokens):
        options = every
        if groups:
            size = experts // groups
            allowed = draw.sample(range(groups), taken)
            options = [one for group in allowed for one in range(group * size, (group + 1) * size)]
        hits += len({one * parts // experts for one in draw.sample(options, chosen)})
    share = reached(parts, experts, chosen, groups, taken)
    assert share == pytest.approx(hits / tokens / parts, rel=0.02)


def test_rows_that_are_sent_once_a_node() -> None:
    """Top-8 of 128 experts over 4 nodes: 2.7 copies leave the node, and not 6."""
    hardware = HardwareConfig(
        intra_node_gbps=100, inter_node_gbps=10, link_efficiency=1.0, latency_us=0
    )
    where, row = Group("ep", 32, 8), 1e6

    def share(parts: int) -> float:
        return reached(parts, 128, 8)

    once = once_a_node(hardware, where, row, 1.0, share)
    assert once.inter / row == pytest.approx(2.7, abs=0.05)
    assert all_to_all(hardware, where, 8 * row).inter / row == 6
    assert once.seconds == pytest.approx(once.inter / 10e9)
    # Inside a node only ranks with one of its experts get a row, whatever number of them.
    inside = once_a_node(hardware, Group("ep", 8, 8), row, 1.0, lambda parts: reached(parts, 8, 2))
    assert inside.intra / row == pytest.approx(7 * (1 - 21 / 28))


def test_all_wait_for_the_busiest_rank() -> None:
    hardware = HardwareConfig(intra_node_gbps=100, inter_node_gbps=10, latency_us=0)
    where = Group("ep", 16, 8)
    even, uneven = (all_to_all(hardware, where, 1e8, busiest) for busiest in (1.0, 1.5))
    assert uneven.seconds == pytest.approx(1.5 * even.seconds)
    assert uneven[:2] == even[:2]


@pytest.mark.parametrize("kilobytes", [1.0, 64.0, 1e6])
def test_bandwidth_saturates_with_the_message(kilobytes: float) -> None:
    """A message of the half size takes twice as long as at full bandwidth; large ones do not."""
    link = {"intra_node_gbps": 100.0, "inter_node_gbps": 10.0, "link_efficiency": 1.0,
            "latency_us": 0.0}  # fmt: skip
    half = HardwareConfig(**link, intra_message_kb=64, inter_message_kb=64)  # type: ignore[arg-type]
    full = HardwareConfig(**link)  # type: ignore[arg-type]
    layout = Layout(16, 1, 2, 1, 1, 1, 1, "stage", 16, 64)
    for call in (
        lambda one: point_to_point(layout, one, 0, 1e3 * kilobytes),
        lambda one: all_to_all(one, Group("ep", 8, 8), 8e3 * kilobytes),
        lambda one: all_gather(one, Group("tp", 8, 8), 8e3 * kilobytes),
    ):
        slower = call(half).seconds / call(full).seconds
        assert slower == pytest.approx(1 + 64 / kilobytes)


def test_links_between_pairs_work_at_once() -> None:
    """4 devices with a link for each pair exchange three times as fast, and a pair does not."""
    switch = HardwareConfig(intra_node_gbps=100, link_efficiency=1.0, latency_us=0)
    pairs = dataclasses.replace(switch, paired_links=True)
    four, two = Group("ep", 4, 4), Group("ep", 2, 2)
    for call in (all_to_all, all_gather):
        assert call(switch, four, 1e9).seconds == pytest.approx(3 * call(pairs, four, 1e9).seconds)
        assert call(switch, two, 1e9) == call(pairs, two, 1e9)


def test_fast_links_may_reach_over_nodes() -> None:
    layout = Layout(128, 1, 2, 1, 1, 64, 1, "stage", 16, 64)
    node = HardwareConfig(devices_per_node=4)
    assert group(layout, node, "ep").per_node == 4
    assert group(layout, dataclasses.replace(node, fast_domain=64), "ep").inside


@settings(deadline=None, max_examples=300)
@given(
    st.tuples(*[st.sampled_from((1, 2, 3, 4, 6, 8))] * 5),
    st.sampled_from((1, 2, 3, 5, 16)),
    st.booleans(),
    st.sampled_from((1, 2, 3, 4, 8, 72)),
)
def test_a_group_is_placed_as_its_list_of_members_says(
    sizes: tuple[int, ...], replicas: int, span: bool, devices: int
) -> None:
    tensor, context, pipeline, expert, expert_tensor = sizes
    if span:
        expert, expert_tensor = tensor * pipeline, 1
    grid = expert * expert_tensor * (1 if span else pipeline)
    world = replicas * lcm(tensor * context * pipeline, grid)
    layout = Layout(
        world, tensor, pipeline, 1, context, expert, expert_tensor, "span" if span else "stage"
    )
    node = HardwareConfig(devices_per_node=devices)
    for kind in GROUPS.keys() - {"embd"}:
        lists = [layout.members(kind, rank) for rank in (0, world - 1)]
        placed = [min(Counter(rank // devices for rank in ranks).values()) for ranks in lists]
        assert group(layout, node, kind) == (kind, len(lists[0]), min(placed))
