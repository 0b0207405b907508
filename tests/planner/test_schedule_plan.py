"""Schedules of real plans: sizes, figures, files and the command."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import networkx as nx
import pytest

from moe_train import cli
from moe_train.commands.schedule import schedule_report
from moe_train.errors import ConfigError
from moe_train.features.schedules import SCHEDULES
from moe_train.parallel.layout import Layout
from moe_train.parallel.shapes import shapes
from moe_train.planner.cost.communication import step_traffic
from moe_train.planner.cost.passes import layer_time
from moe_train.planner.estimate import Estimate
from moe_train.planner.plan import Plan, assumptions_of
from moe_train.planner.resolution import resolve_run
from moe_train.planner.schedule.export import write_graph
from moe_train.planner.schedule.schedule import Schedule, build_schedule, choose_schedule
from moe_train.planner.schedule.work import LayerPieces, total

MISSION = ["experiment=moe_30b_8x64gb"]
STAGE = [*MISSION, "parallel.placement=stage", "parallel.expert=2"]
VOCAB = 50304
_BUILT: dict[tuple[str, ...], Schedule] = {}


def built(*args: str, detail: str = "stage", kind: str = "auto", world: int = 8) -> Schedule:
    key = (*args, detail, kind, str(world))
    if key not in _BUILT:
        run = resolve_run(list(args), world)
        config, layout = run.config, run.layout
        taken = assumptions_of(config)
        _BUILT[key] = build_schedule(Plan(config, layout, VOCAB, assumptions=taken), kind, detail)
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


@pytest.mark.parametrize(("args", "world", "pieces", "dense", "again"), LAYOUTS)
def test_node_counts(args: list[str], world: int, pieces: int, dense: int, again: int) -> None:
    layout = built(*args, world=world).layout
    p, v, m, layers = layout.pipeline, layout.virtual_pipeline, 8, 16
    if layout.span:
        slots, local = m + p - 1, layers // p
        by_stage = 2 * p * slots
        inner = m * (2 * layers * dense + again * dense + 4 + 2 * (p - 1))
        by_layer = 2 * slots * local * (2 + p) + inner
    else:
        by_stage = 2 * v * p * m
        by_layer = m * (2 * layers * pieces + again * pieces + 4 + 2 * (v * p - 1))
    assert len(built(*args, world=world).graph) == by_stage + 2 * p
    assert len(built(*args, world=world, detail="layer").graph) == by_layer + 2 * p


@pytest.mark.parametrize("args", [STAGE, MISSION, V2])
def test_pieces_add_up_to_the_planners_layer(args: list[str]) -> None:
    plan = Plan.of(resolve_run(args, 8))
    layer = layer_time(plan)
    pieces = LayerPieces(plan, layer)
    assert total(pieces.whole(1)) == pytest.approx(layer.forward())
    for again in (False, True):
        back = pieces.whole_back(1, recomputed=again)
        assert total(back) == pytest.approx(layer.backward(recomputed=again))


@pytest.mark.parametrize("args", [STAGE, MISSION, V2])
def test_the_longest_path_agrees_with_the_planners_formula(args: list[str]) -> None:
    """Formulas know no uneven stages in the middle: a few per cent, not a bound."""
    result = built(*args, detail="layer")
    assert result.timing.step == pytest.approx(result.predicted.step, rel=0.05)


@pytest.mark.parametrize(
    "args", [STAGE, MISSION, V2, [*MISSION, *FEW, "parallel.overlap_expert_comm=true"]]
)
def test_one_bubble_in_plan_and_schedule(args: list[str]) -> None:
    """The closed form that every report quotes is what the graph's stages wait."""
    result = built(*args, detail="layer")
    plan = Estimate.of(resolve_run(args, 8))
    assert schedule_report(result)["bubble"] == plan.report()["time"]["bubble"]
    assert plan.time.bubble == pytest.approx(result.timing.bubble, abs=0.02)


@pytest.mark.parametrize("detail", ["stage", "layer"])
def test_turns_of_a_tick_hide_the_exchange(detail: str) -> None:
    """Between nodes the exchange is what takes longest; without turns all of it is waited for."""
    plain = built(*MISSION, *FEW, detail=detail)
    turns = built(*MISSION, *FEW, "parallel.overlap_expert_comm=true", detail=detail)
    assert turns.timing.step < plain.timing.step
    assert turns.held == (8, 6, 4, 2) and plain.held == (7, 5, 3, 1)
    assert len(turns.graph) == len(plain.graph)
    assert turns.timing.step == pytest.approx(turns.predicted.step, rel=0.05)


def test_nodes_and_edges_say_who_and_how_much() -> None:
    graph = built(*STAGE, *FEW, detail="layer").graph
    experts = graph.nodes["F3@1/L6/experts"]
    assert (experts["ranks"], experts["experts"], experts["layers"]) == ("2-3", "0-63", "6")
    run = resolve_run([*STAGE, *FEW], 8)
    config, layout = run.config, run.layout
    z = shapes(config, layout, VOCAB, assumptions_of(config))
    sent = graph.edges["F3@1/send", "F3@2/L9/gather"]
    assert sent == {"kind": "activation", "bytes": z.N * z.H * z.b}
    back = graph.edges["B3@2/send", "B3@1/L8/again/gather"]
    assert back == {"kind": "gradient", "bytes": z.N * z.H * z.b}
    assert graph.edges["F3@1/L8/combine", "B3@1/L8/again/gather"]["kind"] == "saved"
    assert graph.edges["F3@1/L8/combine", "B3@1/L8/again/gather"]["bytes"] > 0
    two = built(*STAGE, *FEW, world=16, detail="layer").graph
    plan = Plan.of(resolve_run([*STAGE, *FEW], 16))
    for stage in (0, 3):
        traffic = step_traffic(plan, stage)
        whole = sum(one.intra_bytes + one.inter_bytes for one in traffic if one.kind != "pp"
                    and ("gradients" in one.name or "weights" in one.name))  # fmt: skip
        assert two.nodes[f"gradients@{stage}"]["bytes"] == pytest.approx(whole) and whole > 0
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


@pytest.mark.parametrize("args", [[*STAGE, *FEW], [*MISSION, *FEW], V2])
@pytest.mark.parametrize("detail", ["stage", "layer"])
def test_files_hold_the_same_graph(args: list[str], detail: str, tmp_path: Path) -> None:
    graph = built(*args, detail=detail).graph
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
    assert choose_schedule(plain, "auto") is choose_schedule(plain, "1f1b") is SCHEDULES["1f1b"]
    assert choose_schedule(dealt, "auto").name == "interleaved"
    assert choose_schedule(span, "auto").name == "span"
    assert choose_schedule(plain, "gpipe").name == "gpipe"
    for layout, kind in ((plain, "span"), (plain, "interleaved"), (span, "1f1b"),
                         (dealt, "gpipe"), (plain, "zigzag")):  # fmt: skip
        with pytest.raises(ConfigError, match="--kind"):
            choose_schedule(layout, kind)


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


def test_pictures_of_the_docs_are_drawn_by_their_commands(tmp_path: Path) -> None:
    """Every picture has a command, and the command a legal plan that still draws."""
    docs = Path(__file__).parents[2] / "docs"
    text = (docs / "schedule.md").read_text(encoding="utf-8")
    (shared,) = re.findall(r'^for_pictures="(.*)"$', text, re.MULTILINE)
    commands = re.findall(
        r"^moe-train schedule \$for_pictures (.*) --figure docs/pictures/(\S+)$", text, re.MULTILINE
    )
    assert sorted(name for _, name in commands) == sorted(
        path.name for path in (docs / "pictures").iterdir()
    )
    overrides, name = commands[0]
    target = tmp_path / name
    assert cli.main(["schedule", *shared.split(), *overrides.split(), "--figure", str(target)]) == 0
    assert b"<svg" in target.read_bytes()
    used = {
        name
        for page in docs.glob("*.md")
        for name in re.findall(r"\(pictures/(\S+)\)", page.read_text(encoding="utf-8"))
    }
    assert used == {name for _, name in commands}
