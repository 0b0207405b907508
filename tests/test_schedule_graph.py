"""The step as a graph: shape, order, times and files, for any layout."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train import cli
from moe_train.errors import ConfigError
from moe_train.plan.bubbles import bubble, span_bubble, span_dense_bubble
from moe_train.plan.fit import assumptions_of
from moe_train.plan.layout import Layout
from moe_train.plan.prepare import prepare
from moe_train.plan.schedule.clock import run_clock
from moe_train.plan.schedule.export import write_graph
from moe_train.plan.schedule.orders import Pass, most_held, stage_order
from moe_train.plan.schedule.pieces import LayerPieces
from moe_train.plan.schedule.piped import piped_graph
from moe_train.plan.schedule.schedule import Schedule, build_schedule, choose_kind
from moe_train.plan.schedule.spanning import span_graph
from moe_train.plan.schedule.work import Ends, Piece, PipedWork, Place, SpanWork, total
from moe_train.plan.shapes import shapes
from moe_train.plan.timing import layer_time

MISSION = ["experiment=moe_30b_8x64gb"]
STAGE = [*MISSION, "parallel.placement=stage", "parallel.expert=2"]
VOCAB = 50304
STAGES = st.integers(1, 6)
BATCHES = st.integers(1, 12)
SECONDS = st.floats(0, 3)


def ends(stages: int, chunks: int = 1, message: float = 0.0, update: float = 0.0) -> Ends:
    place = Place("0", ("1",) * chunks, "0")
    return Ends(
        (Piece("send", message, 8.0),) * stages, (4.0,) * stages,
        Piece("gradients", update), Piece("optimizer", update), (place,) * stages,
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
        (frozenset(),) * stages, (Piece("dispatch", 0.0, 1.0), Piece("combine", 0.0, 1.0)),
        served, tuple(2 * each for each in served), (Piece("head", 0.0),) * 2, ends(stages),
    )  # fmt: skip


@settings(deadline=None)
@given(STAGES, BATCHES, st.floats(0.1, 3), st.floats(0.1, 3), st.sampled_from(["1f1b", "gpipe"]))
def test_bubble_of_uniform_stages(
    stages: int, batches: int, forward: float, backward: float, kind: str
) -> None:
    graph = piped_graph(uniform(stages, batches, 1, forward, backward), kind, "stage")
    timing = run_clock(graph)
    assert timing.bubble == pytest.approx((stages - 1) / (batches + stages - 1))
    assert timing.bubble == pytest.approx(bubble(stages, batches))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(2, 4), st.floats(0.3, 3))
def test_bubble_of_interleaved_stages(stages: int, rounds: int, chunks: int, ratio: float) -> None:
    """With micro-batches in whole groups of P, as Megatron asks for."""
    batches = rounds * stages
    graph = piped_graph(uniform(stages, batches, chunks, 1.0, ratio), "interleaved", "stage")
    found = run_clock(graph).bubble
    assert found == pytest.approx((stages - 1) / (chunks * batches + stages - 1))
    assert found == pytest.approx(bubble(stages, batches, chunks))


@settings(deadline=None, max_examples=50)
@given(STAGES, BATCHES, st.integers(1, 3), st.floats(0, 2), st.floats(0.1, 3))
def test_bubble_of_spanning_stages(
    stages: int, batches: int, layers: int, dense: float, experts: float
) -> None:
    """Dense work waits as in 1F1B; experts never do."""
    work = spanning(stages, batches, layers, dense, experts)
    found = run_clock(span_graph(work, "stage")).bubble
    assert found == pytest.approx(span_bubble(stages, batches, 3 * dense, 3 * experts), abs=1e-9)
    layered = run_clock(span_graph(work, "layer")).bubble
    assert layered == pytest.approx(found, abs=1e-9)
    pure = run_clock(span_graph(spanning(stages, batches, layers, 1.0, 0.0), "layer")).bubble
    assert pure == pytest.approx(span_dense_bubble(stages, batches))
    assert run_clock(span_graph(spanning(stages, batches, layers, 0.0, 1.0), "layer")).bubble == (
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
        served, tuple(2 * each for each in served),
        (Piece("head", draw(SECONDS)), Piece("head", draw(SECONDS))),
        ends(stages, 1, draw(SECONDS), draw(SECONDS)), draw(st.integers(0, 1)),
    )  # fmt: skip


def check_times(graph: Any) -> None:
    """Bounds and exclusivity, counted apart from the clock."""
    assert nx.is_directed_acyclic_graph(graph)
    timing = run_clock(graph)
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
    by_stage = run_clock(piped_graph(*drawn, "stage"))
    by_layer = run_clock(piped_graph(*drawn, "layer"))
    assert by_layer.step == pytest.approx(by_stage.step)
    assert by_layer.bubble == pytest.approx(by_stage.bubble, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(random_span())
def test_lockstep_of_layers_costs_no_less_than_that_of_halves(work: SpanWork) -> None:
    """A half's stages meet at every exchange. Only work outside the exchanges (the head and
    messages) may overlap with the next half when looked at by layer."""
    outside = total(work.head) + 2 * work.ends.messages[0].seconds
    halves = work.microbatches + work.stages
    by_stage = run_clock(span_graph(work, "stage")).step
    by_layer = run_clock(span_graph(work, "layer")).step
    assert by_layer >= by_stage - halves * outside - 1e-9 * (1 + by_stage)


def megatrons(stages: int, stage: int, batches: int, chunks: int) -> list[tuple[str, int, int]]:
    """(direction, micro-batch, chunk) in the order of Megatron's own tables."""
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    table = schedules.get_schedule_table(batches, chunks, stages)

    class Place:
        virtual_pipeline_model_parallel_size = chunks

        class pp_group:
            size = staticmethod(lambda: stages)
            rank = staticmethod(lambda: stage)

    _, _, warm, _ = schedules.get_pp_rank_microbatches(
        batches, chunks, stages, p2p_communicator=Place
    )
    forward = [("forward", batch, chunk) for batch, chunk in table]
    backward = [("backward", batch, chunks - 1 - chunk) for batch, chunk in table]
    order = forward[:warm]
    for one, other in zip(forward[warm:], backward, strict=False):
        order += [one, other]
    return order + backward[len(table) - warm :]


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(2, 3), st.data())
def test_interleaved_order_is_megatrons(
    stages: int, rounds: int, chunks: int, data: st.DataObject
) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    batches = rounds * stages + data.draw(st.integers(0, stages - 1))
    order = stage_order("interleaved", stages, stage, batches, chunks)
    assert [(one.direction, one.microbatch, one.chunk) for one in order] == megatrons(
        stages, stage, batches, chunks
    )


@given(STAGES, BATCHES, st.sampled_from(["gpipe", "1f1b"]))
def test_every_pass_once_and_no_more_held_than_promised(
    stages: int, batches: int, kind: str
) -> None:
    for stage in range(stages):
        order = stage_order(kind, stages, stage, batches)
        wanted = {
            Pass(stage, 0, batch, direction)
            for batch in range(batches)
            for direction in ("forward", "backward")
        }
        assert len(order) == len(wanted) and set(order) == wanted
        promised = batches if kind == "gpipe" else min(batches, stages - stage)
        assert most_held(order) == promised


_BUILT: dict[tuple[str, ...], Schedule] = {}


def built(*words: str, detail: str = "stage", kind: str = "auto", world: int = 8) -> Schedule:
    key = (*words, detail, kind, str(world))
    if key not in _BUILT:
        config, layout = prepare(list(words), world)
        taken = assumptions_of(config)
        _BUILT[key] = build_schedule(config, layout, VOCAB, taken, kind, detail)
    return _BUILT[key]


FEW = ["batch.accumulation=1"]
V2 = [*STAGE, *FEW, "parallel.virtual_pipeline=2"]
LAYOUTS = [
    # words, world, pieces to a layer (A), dense ones (D), recomputed layers (C)
    ([*STAGE, *FEW], 8, 7, 0, 14),
    (V2, 8, 7, 0, 14),
    ([*STAGE, *FEW, "recompute.layers=none"], 8, 7, 0, 0),
    ([*STAGE, *FEW, "parallel.tensor=1", "recompute.layers=all"], 8, 5, 0, 16),
    ([*STAGE, *FEW, "model.shared_expert_hidden=2048"], 8, 8, 0, 14),
    ([*MISSION, *FEW], 8, 0, 4, 14),
    ([*MISSION, *FEW, "recompute.layers=none"], 16, 0, 4, 0),
]


@pytest.mark.parametrize(("words", "world", "pieces", "dense", "again"), LAYOUTS)
def test_node_counts(words: list[str], world: int, pieces: int, dense: int, again: int) -> None:
    layout = built(*words, world=world).layout
    p, v, m, layers = layout.pipeline, layout.virtual_pipeline, 8, 16
    if layout.span:
        halves, local = m + p - 1, layers // p
        by_stage = 2 * p * halves
        inner = m * (2 * layers * dense + again * dense + 2 + 2 * (p - 1))
        by_layer = 2 * halves * local * (2 + p) + inner
    else:
        by_stage = 2 * v * p * m
        by_layer = m * (2 * layers * pieces + again * pieces + 2 + 2 * (v * p - 1))
    assert len(built(*words, world=world).graph) == by_stage + 2 * p
    assert len(built(*words, world=world, detail="layer").graph) == by_layer + 2 * p


@pytest.mark.parametrize("words", [STAGE, MISSION, V2])
def test_pieces_add_up_to_the_planners_layer(words: list[str]) -> None:
    config, layout = prepare(words, 8)
    z = shapes(config, layout, VOCAB, assumptions_of(config))
    layer = layer_time(config, layout, z)
    pieces = LayerPieces(config, layout, z, layer)
    assert total(pieces.whole(1)) == pytest.approx(layer.forward())
    for again in (False, True):
        back = pieces.whole_back(1, recomputed=again)
        assert total(back) == pytest.approx(layer.backward(recomputed=again))


@pytest.mark.parametrize("words", [STAGE, MISSION, V2])
def test_the_longest_path_agrees_with_the_planners_formula(words: list[str]) -> None:
    """Formulas know no uneven stages in the middle: a few per cent, not a bound."""
    found = built(*words, detail="layer")
    assert found.timing.step == pytest.approx(found.predicted.step, rel=0.05)


def test_nodes_and_edges_say_who_and_how_much() -> None:
    graph = built(*STAGE, *FEW, detail="layer").graph
    experts = graph.nodes["F3@1/L6/experts"]
    assert (experts["ranks"], experts["experts"], experts["layers"]) == ("2-3", "0-63", "6")
    config, layout = prepare([*STAGE, *FEW], 8)
    z = shapes(config, layout, VOCAB, assumptions_of(config))
    sent = graph.edges["F3@1/send", "F3@2/L9/gather"]
    assert sent == {"kind": "activation", "bytes": z.N * z.H * z.b}
    back = graph.edges["B3@2/send", "B3@1/L8/again/gather"]
    assert back == {"kind": "gradient", "bytes": z.N * z.H * z.b}
    assert graph.edges["F3@1/L8/combine", "B3@1/L8/again/gather"]["kind"] == "kept"
    assert graph.edges["F3@1/L8/combine", "B3@1/L8/again/gather"]["bytes"] > 0
    assert graph.nodes["F3@1/L6/dispatch"]["bytes"] > graph.nodes["F3@1/L6/combine"]["bytes"] > 0


def test_every_rank_serves_every_half() -> None:
    """Under span a stage's experts run in all 2 (M + P - 1) halves of each local layer."""
    graph = built(*MISSION, *FEW, detail="layer").graph
    experts = Counter(facts["stage"] for facts in graph.nodes.values() if facts["op"] == "experts")
    assert set(experts.values()) == {2 * (8 + 3) * 4} and len(experts) == 4
    joint = [facts for facts in graph.nodes.values() if facts["op"] == "dispatch"]
    assert len(joint) == 2 * (8 + 3) * 4
    assert {facts["ranks"] for facts in joint} == {"0-1,2-3,4-5,6-7"}
    assert graph.nodes["T3f/l0/dispatch"]["layers"] == "1,5,9,13"
    assert graph.nodes["T3f/l0/experts@2"]["experts"] == "32-47"
    assert graph.edges["F0@0/send", "F0@1/L5/gather"]["kind"] == "activation"


@pytest.mark.parametrize("words", [[*STAGE, *FEW], [*MISSION, *FEW], V2])
@pytest.mark.parametrize("detail", ["stage", "layer"])
def test_files_hold_the_same_graph(words: list[str], detail: str, tmp_path: Path) -> None:
    graph = built(*words, detail=detail).graph
    for suffix in ("graphml", "json", "dot"):
        write_graph(graph, tmp_path / f"g.{suffix}")
    loaded = nx.read_graphml(tmp_path / "g.graphml")
    linked = nx.node_link_graph(json.loads((tmp_path / "g.json").read_text()), edges="edges")
    for other in (loaded, linked):
        assert nx.is_directed_acyclic_graph(other)
        assert dict(other.nodes(data=True)) == dict(graph.nodes(data=True))
        assert {(a, b): f for a, b, f in other.edges(data=True)} == {
            (a, b): f for a, b, f in graph.edges(data=True)
        }
    text = (tmp_path / "g.dot").read_text()
    edges = re.findall(r'^  "([^"]+)" -> "([^"]+)" \[', text, re.MULTILINE)
    assert sorted(edges) == sorted(graph.edges)
    assert len(re.findall(r'^  "[^"]+" \[', text, re.MULTILINE)) == len(graph)


def test_kinds_that_a_layout_cannot_run_are_refused() -> None:
    plain, span = Layout(8, 2, 4), Layout(8, 2, 4, placement="span")
    dealt = Layout(8, 2, 4, 2)
    assert choose_kind(plain, "auto") == choose_kind(plain, "1f1b") == "1f1b"
    assert choose_kind(dealt, "auto") == "interleaved"
    assert choose_kind(span, "auto") == "span"
    assert choose_kind(plain, "gpipe") == "gpipe"
    for layout, kind in ((plain, "span"), (plain, "interleaved"), (span, "1f1b"),
                         (dealt, "gpipe"), (plain, "zigzag")):  # fmt: skip
        with pytest.raises(ConfigError, match="--kind"):
            choose_kind(layout, kind)


def test_command_writes_what_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, picture = tmp_path / "r.json", tmp_path / "p.svg"
    argv = ["schedule", *MISSION, *FEW, "--json", str(report), "--figure", str(picture)]
    assert cli.main([*argv, "--dag", str(tmp_path / "g.graphml")]) == 0
    data = json.loads(report.read_text())
    assert data["kind"] == "span" and data["nodes"] == 2 * 4 * 11 + 8
    assert data["step_seconds"] >= data["resource_bound_seconds"]
    assert [stage["held"] for stage in data["stages"]] == [7, 5, 3, 1]
    assert "bubble" in capsys.readouterr().out
    first = picture.read_bytes()
    assert b"<svg" in first
    assert cli.main(argv) == 0
    assert picture.read_bytes() == first, "the same schedule gives the same picture"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--dag", "g.txt"), ("--figure", "g.bmp"), ("--kind", "interleaved"), ("--world", "0"),
     ("--imbalance", "0.5"), ("--beside", "none.json")],
)  # fmt: skip
def test_command_refuses(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schedule", *STAGE, *FEW, option, value]) == 2
    assert option in capsys.readouterr().err
