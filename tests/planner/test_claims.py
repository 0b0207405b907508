"""The source document's claims: every verdict, and the rules by which verdicts are found."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.cli import main
from moe_train.errors import ConfigError
from moe_train.parallel.shapes import Assumptions
from moe_train.planner.claims.comparisons import interleaved
from moe_train.planner.claims.document import Claim, Document, Section, find, load
from moe_train.planner.claims.quantities import QUANTITIES
from moe_train.planner.claims.report import as_data, as_markdown, open_plan
from moe_train.planner.claims.verdicts import (
    CONDITIONAL,
    CONFIRMED,
    CONTRADICTS,
    GRID,
    REFUTED,
    Verdict,
    judge,
    solve,
)
from moe_train.planner.estimate import Estimate
from moe_train.planner.resolution import resolve_run

CONFIRMED_IDS = [
    "1.1", "1.2", "1.3", "1.4", "2.1", "2.3", "2.4", "2.5", "2.7", "2.8", "2.9", "2.10", "3.2",
    "3.3", "4.1", "4.2", "4.3", "5.1", "5.6", "5.8", "5.9", "7.1", "7.2", "7.3", "7.4", "7.5",
    "7.6", "7.7", "7.8", "7.9", "8.5",
]  # fmt: skip
REFUTED_IDS = [
    "0.1", "1.7", "2.11", "5.2", "5.3", "6.5", "8.1", "8.2", "8.3", "8.6", "8.7",
]  # fmt: skip
CONDITIONS = {
    # claim: a word of its condition
    "2.2": "routing stays even",
    "3.1": "experts placed as planned (8 devices)",
    "5.4": "world=16",
    "5.5": "parallel.overlap_expert_comm=true",
    "5.10": "experts' parameters alone",
    "6.1": "data.sequence is",
    "6.2": "data.sequence is",
    "6.3": "optimizer state alone (45.8 GB)",
    "6.4": "71.6 %",
    "8.4": "claims 3.1",
}
CONTRADICTIONS = {
    # claim: the claims that it contradicts
    "1.5": ("6.3",),
    "1.6": ("6.4",),
    "2.6": ("2.1",),
    "5.7": ("2.1",),
}


@pytest.fixture(scope="module")
def document() -> Document:
    return load(find("source_document"))


@pytest.fixture(scope="module")
def judged(document: Document) -> tuple[Estimate, dict[str, Verdict]]:
    subject, verdicts = open_plan(document, [], 8, Assumptions())
    return subject, {verdict.claim.id: verdict for verdict in verdicts}


def test_every_verdict_has_its_expectation(document: Document) -> None:
    expected = [*CONFIRMED_IDS, *REFUTED_IDS, *CONDITIONS, *CONTRADICTIONS]
    assert sorted(expected) == sorted(claim.id for claim in document.claims)


@pytest.mark.parametrize("name", CONFIRMED_IDS)
def test_confirmed(judged: tuple[Estimate, dict[str, Verdict]], name: str) -> None:
    verdict = judged[1][name]
    assert verdict.kind == CONFIRMED, verdict
    assert verdict.claim.about or verdict.claim.holds(verdict.value or 0.0)


@pytest.mark.parametrize("name", REFUTED_IDS)
def test_refuted(judged: tuple[Estimate, dict[str, Verdict]], name: str) -> None:
    verdict = judged[1][name]
    assert verdict.kind == REFUTED, verdict
    assert verdict.value is None or not verdict.claim.holds(verdict.value)


@pytest.mark.parametrize(("name", "word"), CONDITIONS.items())
def test_true_only_if(judged: tuple[Estimate, dict[str, Verdict]], name: str, word: str) -> None:
    verdict = judged[1][name]
    assert verdict.kind == CONDITIONAL, verdict
    assert word in verdict.condition


@pytest.mark.parametrize(("name", "others"), CONTRADICTIONS.items())
def test_contradictions(
    judged: tuple[Estimate, dict[str, Verdict]], name: str, others: tuple[str, ...]
) -> None:
    verdict = judged[1][name]
    assert verdict.kind == CONTRADICTS, verdict
    assert verdict.contradicts == others
    assert verdict.condition, "what it would take is said, too"


def test_memory_of_the_document_is_explained(judged: tuple[Estimate, dict[str, Verdict]]) -> None:
    """17.7 GB: no optimizer state. 45 GB: 12 bytes a parameter. 18 bytes would not fit."""
    assert "no optimizer" in judged[1]["1.5"].condition
    assert judged[1]["6.3"].shown["memory.plain_adam_gb"] == pytest.approx(68.7, abs=0.05)


@pytest.mark.parametrize("name", ["6.1", "6.2"])
def test_solved_conditions_hold_at_their_edges_and_not_beyond(
    judged: tuple[Estimate, dict[str, Verdict]], document: Document, name: str
) -> None:
    verdict = judged[1][name]
    arguments = verdict.condition.replace(",", "").split()
    low, high = int(arguments[2]), int(arguments[4])
    assert low < high < 4096
    for sequence, holds in ((low, True), (high, True), (low - 2, False), (high + 2, False)):
        if sequence < GRID[0]:
            # Not searched: a host that launches for longer than kernels run has no lower edge.
            continue
        micro = max(round(4096 / sequence), 1) if verdict.claim.hold_tokens else 1
        overrides = [*document.overrides, f"data.sequence={sequence}", f"batch.micro={micro}"]
        run = resolve_run(overrides, 8)
        value = QUANTITIES[verdict.claim.quantity].compute(Estimate.of(run, Assumptions()))
        assert verdict.claim.holds(value) == holds, (sequence, value)


def test_the_two_memory_figures_are_near_what_is_computed(
    judged: tuple[Estimate, dict[str, Verdict]],
) -> None:
    """17.7 GB within 6 %, 45 GB within 5 %: the widths that the claims file allows."""
    tolerances = {name: judged[1][name].claim.tolerance for name in ("1.5", "1.6", "6.3", "6.4")}
    assert tolerances == {"1.5": 0.06, "1.6": 0.06, "6.3": 0.05, "6.4": 0.05}


def test_schedules_are_compared_with_their_equals(
    judged: tuple[Estimate, dict[str, Verdict]],
) -> None:
    """Interleaved against plain 1F1B with experts in the same place, both within memory."""
    schedules = interleaved(judged[0])
    assert schedules[0].layout.virtual_pipeline == 1
    assert len(schedules) > 1
    sizes = {replace(one.layout, virtual_pipeline=1) for one in schedules}
    assert len(sizes) == 1
    assert not sizes.pop().span
    for one in schedules:
        assert one.worst.total <= 64e9
    best = min(schedules, key=lambda one: one.time.step)
    assert judged[1]["2.11"].value == pytest.approx(1 - best.time.step / schedules[0].time.step)
    assert best.layout.overrides()[2] in judged[1]["2.11"].reason


def test_the_faster_layout_is_named_and_is_faster(
    judged: tuple[Estimate, dict[str, Verdict]], document: Document
) -> None:
    subject, by_id = judged
    overrides = by_id["8.6"].reason.partition("(")[2].partition(")")[0].split()
    assert len(overrides) == 5
    run = resolve_run([*document.overrides, *overrides], 8)
    faster = Estimate.of(run, subject.assumptions)
    assert faster.worst.total <= 64e9
    assert faster.time.sequences == subject.time.sequences
    gain = 1 - subject.time.tokens_per_second / faster.time.tokens_per_second
    assert by_id["8.6"].value == pytest.approx(gain)


def test_a_solved_condition_fits_the_device(judged: tuple[Estimate, dict[str, Verdict]]) -> None:
    """MFU rises with length only as far as activations fit."""
    reason = judged[1]["6.5"].reason
    longest = int(reason.rpartition("=")[2])
    subject = judged[0]
    data = replace(subject.config.data, sequence=longest)
    assert subject.under(replace(subject.config, data=data)).worst.total <= 64e9
    assert longest < 131072


def test_another_machine_gives_other_verdicts(document: Document) -> None:
    _, verdicts = open_plan(document, ["hardware=h200_141gb"], 8, Assumptions())
    result = {verdict.claim.id: verdict for verdict in verdicts}
    assert result["5.7"].kind == CONFIRMED  # 8 devices a node
    assert result["1.4"].kind == REFUTED  # 8 x 141 GB
    assert result["6.4"].kind != CONFIRMED


def test_every_figure_and_tick_has_a_row(document: Document) -> None:
    """Numbers that the document prints appear in the claims' texts."""
    text = " ".join(claim.text for claim in document.claims)
    for figure in (
        "30B", "120 GB", "60 GB", "512 GB", "27.6 %", "17.7 GB", "64 / 8 = 8", "1/8", "16 heads",
        "2048 / 2 = 1024", "16 / 4 = 4", "8 micro-batches", "1F1B", "1024 modules", "128 modules",
        "2-15", "50 %", "4 steps", "Available GPUs: 8", "proceed with deployment",
        "15-20 ms", "800-1200", "45 GB", "70 %", "55-65 %",
    ):  # fmt: skip
        assert figure in text, figure


@given(
    low=st.floats(1, 1e6), width=st.floats(1.01, 100), slope=st.sampled_from([1, -1]),
    scale=st.floats(0.1, 1e4), unit=st.sampled_from([1, 2, 8]),
)  # fmt: skip
def test_solver_finds_the_range_of_a_monotone_quantity(
    low: float, width: float, slope: int, scale: float, unit: int
) -> None:
    claim = Claim("1", "", quantity="time.mfu", low=low, high=low * width)

    def value(x: int) -> float:
        return scale * (x if slope > 0 else 1e6 / x)

    result = solve(claim, value, unit)
    lowest, highest = max(16 // unit, 1) * unit, 131072
    hits = _candidates(claim, slope, scale, unit, lowest, highest)
    if not hits:
        assert result.low is None
        return
    assert (result.low, result.high) == (hits[0], hits[-1])


def _candidates(
    claim: Claim, slope: int, scale: float, unit: int, lowest: int, highest: int
) -> list[int]:
    """First and last multiple of `unit` for which the claim holds, by inverting the quantity."""
    low, high = claim.range
    ends = (low / scale, high / scale) if slope > 0 else (1e6 * scale / high, 1e6 * scale / low)
    first = max(math.ceil(ends[0] / unit) * unit, lowest)
    last = min(math.floor(ends[1] / unit) * unit, highest)
    # Rounding of the division may leave an end just outside.
    value = (lambda x: scale * x) if slope > 0 else (lambda x: scale * (1e6 / x))
    for step in (unit, -unit):
        end = first if step > 0 else last
        for candidate in (end - step, end, end + step):
            if lowest <= candidate <= highest and claim.holds(value(candidate)):
                if step > 0:
                    first = candidate
                    break
                last = candidate
                break
    return [first, last] if first <= last and claim.holds(value(first)) else []


def _document(*claims: Claim) -> Document:
    return Document("t", (), (Section("s", claims),))


def _judge(*claims: Claim) -> list[Verdict]:
    run = resolve_run(["experiment=moe_30b_8x64gb"], 8)
    subject = Estimate.of(run, Assumptions())

    def replan(words: Sequence[str]) -> Estimate:
        run = resolve_run(["experiment=moe_30b_8x64gb", *words], 8)
        return Estimate.of(run, Assumptions())

    return judge(_document(*claims), subject, replan)


def test_rivals_of_one_subject_contradict_each_other() -> None:
    right = Claim("a", "", quantity="parallel.tensor", equals=2, subject="tp")
    wrong = Claim("b", "", quantity="parallel.tensor", equals=4, subject="tp")
    agreeing = Claim("c", "", quantity="parallel.tensor", low=1, high=3, subject="tp")
    kinds = [verdict.kind for verdict in _judge(right, wrong, agreeing)]
    assert kinds == [CONFIRMED, CONTRADICTS, CONFIRMED]


def test_roll_ups_rest_on_their_claims() -> None:
    right = Claim("1.1", "", quantity="parallel.tensor", equals=2)
    wrong = Claim("2.1", "", quantity="parallel.tensor", equals=4)
    under = Claim("3.1", "", quantity="experts.per_rank", equals=32,
                  under=("parallel.placement=stage parallel.expert=2",))  # fmt: skip
    about = [Claim(f"4.{i}", "", about=ids) for i, ids in
             enumerate([("1.",), ("1.", "3."), ("1.", "2.1", "3.")])]  # fmt: skip
    verdicts = _judge(right, wrong, under, *about)
    assert [v.kind for v in verdicts[2:]] == [CONDITIONAL, CONFIRMED, CONDITIONAL, REFUTED]
    assert "refuted: 2.1" in verdicts[-1].reason


def test_what_a_claim_takes_for_granted_is_its_condition() -> None:
    granted = Claim("1", "", quantity="parallel.tensor", equals=2, provided="links hold")
    wrong = Claim("2", "", quantity="parallel.tensor", equals=4, provided="links hold")
    verdicts = _judge(granted, wrong)
    assert [verdict.kind for verdict in verdicts] == [CONDITIONAL, REFUTED]
    assert verdicts[0].text == "true only if links hold"


def test_an_illegal_condition_is_no_condition() -> None:
    claim = Claim("1", "", quantity="experts.per_rank", equals=64, under=("parallel.expert=1",))
    assert _judge(claim)[0].kind == REFUTED


def test_reports_have_the_documents_sections(
    document: Document, judged: tuple[Estimate, dict[str, Verdict]]
) -> None:
    subject, by_id = judged
    verdicts = [by_id[claim.id] for claim in document.claims]
    text = as_markdown(document, verdicts, subject)
    for section in document.sections:
        assert f"## {section.title}" in text
    assert all(f"| {claim.id} | " in text for claim in document.claims)
    data = as_data(document, verdicts, subject)
    assert len(data["claims"]) == len(document.claims)
    assert sum(data["counts"].values()) == len(document.claims)


def test_command_writes_both_reports(tmp_path: Path) -> None:
    markdown, data = tmp_path / "c.md", tmp_path / "c.json"
    overrides = [
        "plan",
        "--claims",
        "source_document",
        "--report",
        str(markdown),
        "--json",
        str(data),
    ]
    assert main(overrides) == 0
    assert markdown.read_text().startswith("# Parallel strategy verification")
    assert json.loads(data.read_text())["world"] == 8


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("title: t", "malformed"),
        ("[", "claims"),
        ("{title: t, sections: [{title: s, claims: [{id: 1, text: x, quantity: memory.totl}]}]}",
         "unknown quantity"),
        ("{title: t, sections: [{title: s, claims: [{id: 1, text: x, qantity: memory.fits}]}]}",
         "unknown key"),
        ("{title: t, sections: [{title: s, claims: [{id: 1, text: x}]}]}", "quantity or about"),
        ("{title: t, sections: [{title: s, claims: [{id: 1, text: x, about: [a]},"
         " {id: 1, text: x, about: [a]}]}]}", "twice"),
    ],
)  # fmt: skip
def test_a_broken_claims_file_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=word):
        load(path)


def test_no_such_claims_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--claims", "nowhere"]) == 2
    assert "source_document" in capsys.readouterr().err
