"""The step as a graph: order, times and bounds, for any layout and any durations."""

from __future__ import annotations

import itertools
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.features.schedules import (
    SCHEDULES,
    Pass,
    Pipeline,
    bubble,
    most_held,
)
from moe_train.planner.schedule.graph import time_graph
from moe_train.planner.schedule.piped import piped_graph
from moe_train.planner.schedule.spanning import span_graph
from moe_train.planner.schedule.work import Ends, Piece, PipedWork, Place, SpanWork, total

STAGES = st.integers(1, 6)
BATCHES = st.integers(1, 12)
SECONDS = st.floats(0, 3)


def ends(stages: int, chunks: int = 1, message: float = 0.0, update: float = 0.0) -> Ends:
    place = Place("0", ("1",) * chunks, "0")
    return Ends(
        (Piece("send", message, 8.0),) * stages, (4.0,) * stages,
        (Piece("gradients", update),) * stages, Piece("optimizer", update), (place,) * stages,
    )  # fmt: skip


def uniform(stages: int, batches: int, chunks: int, forward: float, backward: float) -> PipedWork:
    keys = list(itertools.product(range(stages), range(chunks)))
    return PipedWork(
        stages, chunks, batches,
        dict.fromkeys(keys, (Piece("attention", forward),)),
        dict.fromkeys(keys, (Piece("attention", backward),)), ends(stages, chunks),
    )  # fmt: skip


def spanning(stages: int, batches: int, layers: int, dense: float, experts: float) -> SpanWork:
    served = tuple(experts * active / stages for active in range(stages + 1))
    return SpanWork(
        stages, batches, layers, (Piece("attention", dense),), (Piece("attention", 2 * dense),),
        (frozenset(),) * stages, *((Piece("dispatch", 0.0, 1.0), Piece("combine", 0.0, 1.0)),) * 2,
        served, tuple(2 * each for each in served), (Piece("embedding", 0.0),) * 2,
        (Piece("head", 0.0),) * 2, ends(stages),
    )  # fmt: skip


@settings(deadline=None)
@given(STAGES, BATCHES, st.floats(0.1, 3), st.floats(0.1, 3), st.sampled_from(["1f1b", "gpipe"]))
def test_bubble_of_uniform_stages(
    stages: int, batches: int, forward: float, backward: float, kind: str
) -> None:
    graph = piped_graph(uniform(stages, batches, 1, forward, backward), kind, "stage")
    timing = time_graph(graph)
    assert timing.bubble == pytest.approx((stages - 1) / (batches + stages - 1))
    assert timing.bubble == pytest.approx(bubble(stages, batches))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(2, 4), st.floats(0.3, 3))
def test_bubble_of_interleaved_stages(stages: int, rounds: int, chunks: int, ratio: float) -> None:
    """With micro-batches in whole groups of P, as Megatron asks for."""
    batches = rounds * stages
    graph = piped_graph(uniform(stages, batches, chunks, 1.0, ratio), "interleaved", "stage")
    result = time_graph(graph).bubble
    assert result == pytest.approx((stages - 1) / (chunks * batches + stages - 1))
    assert result == pytest.approx(bubble(stages, batches, chunks))


@settings(deadline=None, max_examples=50)
@given(STAGES, BATCHES, st.integers(1, 3), st.floats(0, 2), st.floats(0.1, 3))
def test_bubble_of_spanning_stages(
    stages: int, batches: int, layers: int, dense: float, experts: float
) -> None:
    """Dense work waits as in 1F1B, M + P - 1 slots for M; experts, M full slots' work, never do."""
    work = spanning(stages, batches, layers, dense, experts)
    result = time_graph(span_graph(work, "stage")).bubble
    whole = (batches + stages - 1) * dense + batches * experts
    assert result == pytest.approx((stages - 1) * dense / whole, abs=1e-9)
    layered = time_graph(span_graph(work, "layer")).bubble
    assert layered == pytest.approx(result, abs=1e-9)
    pure = time_graph(span_graph(spanning(stages, batches, layers, 1.0, 0.0), "layer")).bubble
    assert pure == pytest.approx(bubble(stages, batches))
    assert time_graph(span_graph(spanning(stages, batches, layers, 0.0, 1.0), "layer")).bubble == (
        pytest.approx(0.0, abs=1e-9)
    )


@st.composite
def random_piped(draw: st.DrawFn) -> tuple[PipedWork, str]:
    """Stages of any speed, messages of any length."""
    kind = draw(st.sampled_from(["gpipe", "1f1b", "interleaved"]))
    stages, batches = draw(STAGES), draw(BATCHES)
    chunks = draw(st.integers(2, 3)) if kind == "interleaved" else 1
    if kind == "interleaved":
        stages = max(stages, 2)
        batches = stages * draw(st.integers(1, 3))
    pieces = st.lists(SECONDS, min_size=1, max_size=3).map(
        lambda spent: tuple(Piece("attention", s, layer=i + 1) for i, s in enumerate(spent))
    )
    keys = list(itertools.product(range(stages), range(chunks)))
    work = PipedWork(
        stages, chunks, batches, {key: draw(pieces) for key in keys},
        {key: draw(pieces) for key in keys}, ends(stages, chunks, draw(SECONDS), draw(SECONDS)),
    )  # fmt: skip
    return work, kind


@st.composite
def random_span(draw: st.DrawFn) -> SpanWork:
    stages = draw(st.integers(1, 4))
    served = tuple(sorted(draw(st.lists(SECONDS, min_size=stages + 1, max_size=stages + 1))))
    layers = draw(st.integers(1, 3))
    repeated = st.frozensets(st.integers(0, layers - 1))
    return SpanWork(
        stages, draw(st.integers(1, 6)), layers,
        (Piece("attention", draw(SECONDS)), Piece("router", draw(SECONDS))),
        (Piece("router", draw(SECONDS)), Piece("attention", draw(SECONDS))),
        tuple(draw(repeated) for _ in range(stages)),
        (Piece("dispatch", draw(SECONDS), 1.0), Piece("combine", draw(SECONDS), 1.0)),
        (Piece("dispatch", draw(SECONDS), 1.0), Piece("combine", draw(SECONDS), 1.0)),
        served, tuple(2 * each for each in served),
        (Piece("embedding", draw(SECONDS)), Piece("embedding", draw(SECONDS))),
        (Piece("head", draw(SECONDS)), Piece("head", draw(SECONDS))),
        ends(stages, 1, draw(SECONDS), draw(SECONDS)), draw(st.integers(0, 1)),
    )  # fmt: skip


def check_times(graph: Any) -> None:
    """Bounds and exclusivity, counted apart from the clock."""
    assert nx.is_directed_acyclic_graph(graph)
    timing = time_graph(graph)
    nodes = dict(graph.nodes(data=True))
    stages = max(facts["stage"] for facts in nodes.values()) + 1
    lanes: dict[int, list[tuple[float, float]]] = {stage: [] for stage in range(stages)}
    for facts in nodes.values():
        for stage in lanes if facts["stage"] < 0 else (facts["stage"],):
            lanes[stage].append((facts["start"], facts["finish"]))
    slop = 1e-9 * (1 + timing.step)
    for lane in lanes.values():
        lane.sort()
        for (_, before), (after, _) in itertools.pairwise(lane):
            assert after >= before - slop, "a stage does two things at once"
    for source, target in graph.edges:
        assert nodes[target]["start"] >= nodes[source]["finish"] - slop
    work = max(sum(end - begin for begin, end in lane) for lane in lanes.values())
    assert timing.step >= work - slop
    assert timing.resource_bound == pytest.approx(work)
    data = nx.DiGraph(
        (a, b, {"weight": nodes[a]["seconds"]})
        for a, b, kind in graph.edges(data="kind")
        if kind not in ("order", "lockstep")
    )
    # networkx weighs edges: an edge costs its source, and every last node gets a sink.
    data.add_edges_from((name, "end", {"weight": nodes[name]["seconds"]}) for name in nodes)
    needed = nx.dag_longest_path_length(data)
    assert timing.step >= needed - slop
    assert timing.dependency_bound == pytest.approx(needed)
    assert timing.step <= sum(facts["seconds"] for facts in nodes.values()) + slop
    assert sum(nodes[name]["seconds"] for name in timing.critical) == pytest.approx(timing.step)
    assert all(facts["slack"] >= 0 for facts in nodes.values())
    assert 0 <= timing.bubble <= 1 + slop


@settings(deadline=None, max_examples=60)
@given(random_piped(), st.sampled_from(["stage", "layer"]))
def test_never_below_its_bounds(drawn: tuple[PipedWork, str], detail: str) -> None:
    check_times(piped_graph(*drawn, detail))


@settings(deadline=None, max_examples=60)
@given(random_span(), st.sampled_from(["stage", "layer"]))
def test_spanning_never_below_its_bounds(work: SpanWork, detail: str) -> None:
    check_times(span_graph(work, detail))


@settings(deadline=None, max_examples=30)
@given(random_piped())
def test_detail_does_not_change_the_time(drawn: tuple[PipedWork, str]) -> None:
    by_stage = time_graph(piped_graph(*drawn, "stage"))
    by_layer = time_graph(piped_graph(*drawn, "layer"))
    assert by_layer.step == pytest.approx(by_stage.step)
    assert by_layer.bubble == pytest.approx(by_stage.bubble, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(random_span())
def test_lockstep_of_layers_costs_no_less_than_that_of_halves(work: SpanWork) -> None:
    """A half's stages meet at every exchange. Only work outside the exchanges (the head and
    messages) may overlap with the next half when looked at by layer."""
    outside = total(work.embedding) + total(work.head) + 2 * work.ends.messages[0].seconds
    halves = work.microbatches + work.stages
    by_stage = time_graph(span_graph(work, "stage")).step
    by_layer = time_graph(span_graph(work, "layer")).step
    assert by_layer >= by_stage - halves * outside - 1e-9 * (1 + by_stage)


@settings(deadline=None, max_examples=30)
@given(random_span())
def test_halves_do_not_overlap(work: SpanWork) -> None:
    """By stage, no stage begins a half before every stage has ended the one before."""
    graph = span_graph(work, "stage")
    time_graph(graph)
    halves: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for name, facts in graph.nodes(data=True):
        if facts["tick"] >= 0:
            back = name.startswith(("B", f"S{facts['tick']}b"))
            lane = halves.setdefault((facts["tick"], back), [])
            lane.append((facts["start"], facts["finish"]))
    assert len(halves) == 2 * (work.microbatches + work.stages - 1)
    assert all(len(lane) == work.stages for lane in halves.values())
    for before, after in itertools.pairwise(sorted(halves)):
        latest = max(end for _, end in halves[before])
        assert min(begin for begin, _ in halves[after]) >= latest - 1e-9 * (1 + latest)


def megatrons(
    stages: int, stage: int, batches: int, chunks: int, overlap: bool
) -> list[tuple[str, int, int]]:
    """(direction, micro-batch, chunk) in the order of Megatron's own tables."""
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    table = schedules.get_schedule_table(batches, chunks, stages)

    class Place:
        virtual_pipeline_model_parallel_size = chunks

        class pp_group:
            size = staticmethod(lambda: stages)
            rank = staticmethod(lambda: stage)

    _, _, warm, _ = schedules.get_pp_rank_microbatches(
        batches,
        chunks,
        stages,
        overlap_moe_expert_parallel_comm=overlap,
        p2p_communicator=Place,
    )
    forward = [("forward", batch, chunk) for batch, chunk in table]
    backward = [("backward", batch, chunks - 1 - chunk) for batch, chunk in table]
    order = forward[:warm]
    for one, other in zip(forward[warm:], backward, strict=False):
        order += [one, other]
    return order + backward[len(table) - warm :]


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(2, 3), st.booleans(), st.data())
def test_interleaved_order_is_megatrons(
    stages: int, rounds: int, chunks: int, overlap: bool, data: st.DataObject
) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    batches = rounds * stages + data.draw(st.integers(0, stages - 1))
    sizes = Pipeline(stages, batches, chunks, int(overlap))
    order = SCHEDULES["interleaved"].order(sizes, stage)
    assert [(one.direction, one.microbatch, one.chunk) for one in order] == megatrons(
        stages, stage, batches, chunks, overlap
    )
    assert most_held(order) == SCHEDULES["interleaved"].in_flight(sizes, stage)


@given(STAGES, BATCHES, st.sampled_from(["gpipe", "1f1b"]))
def test_every_pass_once_and_no_more_held_than_promised(
    stages: int, batches: int, kind: str
) -> None:
    for stage in range(stages):
        order = SCHEDULES[kind].order(Pipeline(stages, batches), stage)
        wanted = {
            Pass(stage, 0, batch, direction)
            for batch in range(batches)
            for direction in ("forward", "backward")
        }
        assert len(order) == len(wanted) and set(order) == wanted
        assert most_held(order) == SCHEDULES[kind].in_flight(Pipeline(stages, batches), stage)
