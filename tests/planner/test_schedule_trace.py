"""Traces: predicted and measured ones are valid, alike, and say what happened."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train import cli
from moe_train.config.compose import compose
from moe_train.errors import EXIT_CONFIG, ConfigFaults
from moe_train.features.schedules import SCHEDULES, Pipeline, ticks
from moe_train.planner.schedule.trace import MEASURED
from moe_train.run_folder.trace_events import check_trace, trace_event, trace_text
from moe_train.testing.layouts import SMALL
from moe_train.testing.runs import Run, train_run

MISSION = ["experiment=moe_30b_8x64gb", "batch.accumulation=1"]
STAGE = [*MISSION, "parallel.placement=stage", "parallel.expert=2"]
SHORT = [*SMALL, "train.steps=3", "batch.microbatches=4", "batch.global=4"]
SPAN = [*SHORT, "parallel.pipeline=2", "parallel.expert=2", "parallel.placement=span"]
DEALT = [*SHORT, "parallel.pipeline=2", "parallel.virtual_pipeline=2", "recompute=all"]


def spans(trace: dict[str, Any], *categories: str) -> list[dict[str, Any]]:
    """Spans of some categories by time; of all without any."""
    results = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    if categories:
        results = [event for event in results if event["cat"] in categories]
    return sorted(results, key=lambda event: event["ts"])


def assert_nested(trace: dict[str, Any]) -> None:
    """Spans of one track contain one another or do not meet: what viewers ask for."""
    slop = 0.5  # microseconds
    for key in {(event["pid"], event["tid"]) for event in spans(trace)}:
        open_until: list[float] = []
        track = [event for event in spans(trace) if (event["pid"], event["tid"]) == key]
        for event in sorted(track, key=lambda event: (event["ts"], -event["dur"])):
            while open_until and open_until[-1] <= event["ts"] + slop:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1] + slop, event
            open_until.append(end)


@pytest.mark.parametrize("detail", ["stage", "layer"])
@pytest.mark.parametrize(
    "args", [STAGE, MISSION, [*STAGE, "parallel.virtual_pipeline=2"]], ids=["1f1b", "span", "v2"]
)
def test_predicted_trace(args: list[str], detail: str, tmp_path: Path) -> None:
    target, report = tmp_path / "t.json", tmp_path / "r.json"
    argv = ["schedule", *args, "--detail", detail, "--trace", str(target), "--json", str(report)]
    assert cli.main(argv) == 0
    trace = json.loads(target.read_text())
    assert check_trace(trace) == []
    assert_nested(trace)
    chunks = 2 if args[-1].startswith("parallel.virtual") else 1
    passes = Counter((event["pid"], event["cat"]) for event in spans(trace, "forward", "backward"))
    assert set(passes.values()) == {8 * chunks} and len(passes) == 4 * 2
    end = max(event["ts"] + event["dur"] for event in spans(trace))
    assert end == pytest.approx(1e6 * json.loads(report.read_text())["step_seconds"])
    arrows = sum(event["ph"] == "s" for event in trace["traceEvents"])
    # Under span and by layer, a gradient may enter at the exchange of all stages.
    wanted = 2 * 8 * (4 * chunks - 1)
    assert arrows == wanted if args is not MISSION else 0 < arrows <= wanted


@pytest.fixture(scope="module")
def span_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_run(tmp_path_factory.mktemp("span") / "run", [*SPAN, "train.trace=true"], 2)


@pytest.mark.world
def test_measured_span_shows_every_half(span_run: Run) -> None:
    assert span_run.codes == [0, 0]
    trace = json.loads((span_run.folder / "trace.json").read_text())
    assert check_trace(trace) == []
    assert_nested(trace)
    assert trace["otherData"] | {"layout": "PP2.EP2.span", "step": 2} == trace["otherData"]
    for rank in range(2):
        ours = [event for event in spans(trace) if event["pid"] == rank]
        assert {event["args"]["stage"] for event in ours} == {rank}
        slots = []
        for tick in ticks(2, 4):
            for half, letter in ((tick.forward, "F"), (tick.backward, "B")):
                if half:
                    slots.append(f"{letter}{half[rank]}" if rank in half else "serve")
        kinds = ("forward", "backward", "serve")
        seen = [event["name"] for event in ours if event["cat"] in kinds]
        assert seen == slots
        exchanged = sum(event["cat"] == "exchange" and event["name"] == "all-to-all"
                        for event in ours)  # fmt: skip
        # 5 halves each way over 2 local layers, with 3 and 2 exchanges.
        assert exchanged == 5 * 2 * (3 + 2)
        assert [event["name"] for event in ours if event["cat"] == "optimizer"] == ["optimizer"]
        assert any(event["cat"] == "p2p" for event in ours)
        whole = max(e["ts"] + e["dur"] for e in ours) / 1e6
        # Ranks enter and leave a step some milliseconds apart, and steps here are short.
        assert 0.5 < whole / span_run.steps[1]["step_seconds"] < 1.1


@pytest.mark.world
def test_measured_turns_have_tracks_of_their_own(tmp_path: Path) -> None:
    """Halves that take turns overlap in time: the second one has a track for itself."""
    overrides = [*SPAN, "train.trace=true", "parallel.overlap_expert_comm=true"]
    run = train_run(tmp_path / "run", overrides, 2)
    assert run.codes == [0, 0]
    trace = json.loads((run.folder / "trace.json").read_text())
    assert check_trace(trace) == []
    assert_nested(trace)
    assert {event["tid"] for event in spans(trace, "forward")} == {0}
    assert 1 in {event["tid"] for event in spans(trace, "backward")}
    for category, letter in (("forward", "F"), ("backward", "B")):
        for rank in range(2):
            seen = [e["name"] for e in spans(trace, category) if e["pid"] == rank]
            assert seen == [f"{letter}{batch}" for batch in range(4)]


@pytest.mark.world
def test_a_traced_run_computes_the_same(span_run: Run, tmp_path: Path) -> None:
    plain = train_run(tmp_path / "plain", SPAN, 2)
    assert not (plain.folder / "trace.json").exists()
    for column in ("loss_hex", "grad_norm_hex"):
        assert span_run.column(column) == plain.column(column)


@pytest.mark.world
def test_measured_interleaved_follows_its_order(tmp_path: Path) -> None:
    run = train_run(tmp_path / "run", [*DEALT, "train.trace=true"], 2)
    assert run.codes == [0, 0]
    trace = json.loads((run.folder / "trace.json").read_text())
    assert check_trace(trace) == []
    assert_nested(trace)
    for stage in range(2):
        seen = [
            (event["cat"], event["args"]["microbatch"], event["args"]["chunk"])
            for event in spans(trace, "forward", "backward")
            if event["pid"] == stage
        ]
        order = SCHEDULES["interleaved"].order(Pipeline(2, 4, 2), stage)
        assert seen == [(one.direction, one.microbatch, one.chunk) for one in order]


@pytest.mark.world
def test_measured_lies_beside_predicted(
    span_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = tmp_path / "both.json"
    measured = span_run.folder / "trace.json"
    argv = ["schedule", *SPAN, "--world", "2", "--trace", str(both), "--beside", str(measured)]
    assert cli.main(argv) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Measured: "))
    seconds = float(line.split()[1])
    assert 0.5 < seconds / span_run.steps[1]["step_seconds"] < 1.1
    trace = json.loads(both.read_text())
    assert check_trace(trace) == []
    order = {
        event["args"]["sort_index"]: event["pid"]
        for event in trace["traceEvents"]
        if event["name"] == "process_sort_index"
    }
    assert [order[key] for key in sorted(order)] == [0, MEASURED, 1, MEASURED + 1]
    names = {
        number: {event["name"] for event in spans(trace, "forward", "backward")
                 if event["pid"] == number}
        for number in order.values()
    }  # fmt: skip
    assert names[0] == names[MEASURED] == names[1] == names[MEASURED + 1]
    assert names[0] == {f"{letter}{batch}" for letter in "FB" for batch in range(4)}


@pytest.mark.world
def test_another_layouts_trace_is_refused(
    span_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["schedule", *SHORT, "--world", "1", "--trace", str(tmp_path / "both.json")]
    code = cli.main([*argv, "--beside", str(span_run.folder / "trace.json")])
    assert code == EXIT_CONFIG
    assert "was measured in layout PP2.EP2.span" in capsys.readouterr().err
    assert not (tmp_path / "both.json").exists()


GOOD = trace_event("F0", "forward", 0.0, 1.0, 0, {})


@given(
    st.sampled_from(
        [{"ph": "Q"}, {"pid": "0"}, {"tid": None}, {"name": 3}, {"ts": -1.0}, {"dur": "long"},
         {"dur": float("inf")}, {"ts": None}, {"cat": "nothing"}]
    )
)  # fmt: skip
def test_what_is_no_trace_is_found(wrong: dict[str, Any]) -> None:
    assert check_trace(json.loads(trace_text([GOOD], {}))) == []
    assert check_trace({"traceEvents": [GOOD, {**GOOD, **wrong}]})


def test_half_an_arrow_and_no_list_are_found() -> None:
    arrow = {"ph": "s", "name": "m", "cat": "p2p", "id": 1, "pid": 0, "tid": 0, "ts": 0.0}
    assert check_trace({"traceEvents": [arrow]})
    assert check_trace({"traceEvents": [arrow, {**arrow, "ph": "f"}]}) == []
    assert check_trace([]) and check_trace({"traceEvents": 3})


def test_combined_passes_cannot_be_told_apart() -> None:
    overrides = [
        "train.trace=true",
        "parallel.overlap_expert_comm=true",
        "parallel.placement=stage",
    ]
    with pytest.raises(ConfigFaults, match="train.trace"):
        compose(overrides)
    assert compose([*overrides[:2], "parallel.placement=span"]).train.trace
