"""Links and the groups on them: each formula against a count of its own."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config.hardware import HardwareConfig
from moe_train.parallel.layout import Layout
from moe_train.planner.cost.links import (
    Group,
    all_gather,
    all_reduce,
    all_to_all,
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
