"""Coordinates and groups are Megatron's own; layers and experts cover the model once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.parallel.layout import GROUPS, Layout

# (world, TP, PP, VPP, CP, EP, ETP)
CASES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 1, 1, 1, 1, 2, 1),
    (2, 2, 1, 1, 1, 1, 2),
    (4, 2, 2, 1, 1, 2, 1),
    (4, 1, 2, 2, 1, 1, 1),
    (8, 2, 4, 1, 1, 2, 1),
    (8, 2, 1, 1, 1, 8, 1),
    (8, 2, 4, 1, 1, 1, 2),
    (8, 2, 1, 1, 2, 2, 2),
    (16, 2, 2, 1, 2, 4, 1),
    (24, 3, 2, 1, 1, 4, 1),
    (32, 2, 4, 1, 1, 8, 1),
]


def make(case: tuple[int, ...], layers: int = 16, experts: int = 64) -> Layout:
    world, tensor, pipeline, chunks, context, expert, expert_tensor = case
    return Layout(
        world, tensor, pipeline, chunks, context, expert, expert_tensor, "stage", layers, experts
    )


@pytest.mark.parametrize("case", CASES)
def test_groups_equal_megatrons(case: tuple[int, ...]) -> None:
    pytest.importorskip("torch")
    from megatron.core.parallel_state import RankGenerator

    layout = make(case)
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(
        tp=layout.tensor,
        ep=1,
        dp=layout.data,
        pp=layout.pipeline,
        cp=layout.context,
        order=order,
    )
    expert = RankGenerator(
        tp=layout.expert_tensor,
        ep=layout.expert,
        dp=layout.expert_data,
        pp=layout.pipeline,
        cp=1,
        order=order,
    )
    names = {"etp": "tp", "ep": "ep", "edp": "dp", "pp": "pp"}
    for kind, (axes, _) in GROUPS.items():
        if kind == "embd":
            continue
        if set(axes) & {"etp", "ep", "edp"}:
            theirs = expert.get_ranks("-".join(names[axis] for axis in axes))
        else:
            theirs = dense.get_ranks("-".join(axes))
        assert layout.groups(kind) == theirs, kind


@pytest.mark.parametrize("case", CASES)
def test_every_rank_is_in_one_group_of_each_kind(case: tuple[int, ...]) -> None:
    layout = make(case)
    for kind in GROUPS:
        members = list(itertools.chain.from_iterable(layout.groups(kind)))
        assert len(members) == len(set(members)), kind
        if kind != "embd":
            assert sorted(members) == list(range(layout.world)), kind


@pytest.mark.parametrize("case", CASES)
def test_coordinates_are_distinct_and_agree_on_the_stage(case: tuple[int, ...]) -> None:
    layout = make(case)
    places = [layout.coordinates(rank) for rank in range(layout.world)]
    assert len({place.dense for place in places}) == layout.world
    assert len({place.expert for place in places}) == layout.world
    assert all(place.dense.pp == place.expert.pp for place in places)


@settings(deadline=None)
@given(st.sampled_from(CASES), st.integers(1, 3), st.integers(1, 3))
def test_layers_and_experts_cover_the_model(case: tuple[int, ...], deep: int, wide: int) -> None:
    stages, chunks, expert = case[2], case[3], case[5]
    layout = make(case, layers=stages * chunks * deep, experts=expert * wide)
    dealt = [n for s in range(stages) for n in layout.stage_layers(s)]
    assert sorted(dealt) == list(range(1, layout.layers + 1))
    for group in layout.groups("ep"):
        hosted = [e for rank in group for e in layout.local_experts(rank)]
        assert hosted == list(range(layout.experts))


def test_interleaving_deals_chunks_round_robin() -> None:
    layout = make((2, 1, 2, 2, 1, 1, 1), layers=8)
    assert layout.stage_layers(0, 0) == [1, 2]
    assert layout.stage_layers(1, 0) == [3, 4]
    assert layout.stage_layers(0, 1) == [5, 6]
    assert layout.stage_layers(0) == [1, 2, 5, 6]


@pytest.mark.parametrize(
    ("case", "tag"),
    [
        ((1, 1, 1, 1, 1, 1, 1), "single"),
        ((2, 1, 1, 1, 1, 1, 1), "DP2"),
        ((2, 1, 1, 1, 1, 2, 1), "EP2"),
        ((4, 1, 1, 1, 1, 2, 1), "DP2.EP2"),
        ((2, 2, 1, 1, 1, 1, 2), "TP2.ETP2"),
        ((2, 1, 2, 2, 1, 1, 1), "PP2.VPP2"),
        ((8, 2, 4, 1, 1, 2, 1), "TP2.PP4.EP2"),
        ((32, 2, 4, 1, 1, 8, 1), "TP2.PP4.EP8"),
    ],
)
def test_tags(case: tuple[int, ...], tag: str) -> None:
    assert make(case).tag == tag


def test_tags_of_all_worlds_differ() -> None:
    layouts = [
        make((world, tensor, pipeline, 1, 1, expert, 1))
        for world in (1, 2, 4, 8, 16)
        for tensor in (1, 2)
        for pipeline in (1, 2)
        for expert in (1, 2, 4)
        if world % (tensor * pipeline) == 0 and world % (expert * pipeline) == 0
    ]
    assert len({layout.tag for layout in layouts}) == len(layouts)


def test_span_spreads_every_layers_experts_over_a_replica() -> None:
    layout = Layout(16, 2, 4, 1, 1, 8, 1, "span", 16, 64)
    assert (layout.data, layout.expert_data) == (2, 2)
    assert layout.tag == "DP2.TP2.PP4.EP8.span"
    assert [len(group) for group in layout.groups("ep")] == [8, 8]
    assert layout.groups("ep") == layout.groups("mp")
    assert layout.groups("edp") == layout.groups("dp")
    for group in layout.groups("ep"):
        assert [e for r in group for e in layout.local_experts(r)] == list(range(64))
    modules = [len(layout.expert_layers(r)) * len(layout.local_experts(r)) for r in range(16)]
    assert set(modules) == {128}
