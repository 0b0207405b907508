"""The source document's claims: every verdict, and the rules by which verdicts are found."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moe_train.parallel.shapes import Assumptions
from moe_train.planner.claims.comparisons import schedules
from moe_train.planner.claims.document import Claim, Document, Section, find, load
from moe_train.planner.claims.quantities import QUANTITIES
from moe_train.planner.claims.report import open_plan
from moe_train.planner.claims.solve import GRID, solve
from moe_train.planner.claims.verdicts import (
    CONDITIONAL,
    CONFIRMED,
    CONTRADICTS,
    NOT_JUDGED,
    REFUTED,
    Verdict,
    judge,
)
from moe_train.planner.estimate import Estimate
from moe_train.planner.plan import BAND
from moe_train.planner.resolution import resolve_run

CONFIRMED_IDS = [
    "1.4", "2.1", "2.3", "2.4", "2.5", "2.7", "2.8", "2.9", "3.2", "3.3", "4.1", "4.2", "4.3",
    "5.6", "5.8", "5.9", "7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "7.7", "7.8", "7.9", "8.5",
]  # fmt: skip
REFUTED_IDS = [
    "0.1", "1.5", "1.6", "5.2", "5.3", "6.2", "6.5", "6.7", "6.8", "6.9", "8.1",
    "8.3", "8.6", "8.7",
]  # fmt: skip
NOT_JUDGED_IDS = ["2.11", "5.11"]
CONDITIONS = {
    # claim: a word of its condition
    "1.1": "ours",
    "1.2": "claim 1.1",
    "1.3": "claim 1.1",
    "1.7": "optim",
    "2.2": "routing stays even",
    "2.10": "all rounds in one flush",
    "3.1": "experts placed as planned (8 devices)",
    "5.5": "parallel.overlap_expert_comm=true",
    "5.7": "hardware.devices_per_node=8",
    "5.10": "experts' parameters alone",
    "6.1": "data.sequence is",
    "6.3": "optimizer state alone (45.8 GB)",
    "6.4": "71.6 %",
    "6.6": "claims 6.1",
    "8.2": "claims 1.7",
    "8.4": "claims 3.1",
}
CONTRADICTIONS = {
    # claim: a claim that it contradicts
    "2.6": "2.1",
    "5.1": "2.1",
    "5.4": "3.2",
}


@pytest.fixture(scope="module")
def document() -> Document:
    return load(find("source_document"))


@pytest.fixture(scope="module")
def judged(document: Document) -> tuple[Estimate, dict[str, Verdict]]:
    subject, verdicts = open_plan(document, [], 8, Assumptions())
    return subject, {verdict.claim.id: verdict for verdict in verdicts}


def test_every_verdict_has_its_expectation(document: Document) -> None:
    expected = [*CONFIRMED_IDS, *REFUTED_IDS, *NOT_JUDGED_IDS, *CONDITIONS, *CONTRADICTIONS]
    assert sorted(expected) == sorted(claim.id for claim in document.claims)


@pytest.mark.parametrize("name", CONFIRMED_IDS)
def test_confirmed(judged: tuple[Estimate, dict[str, Verdict]], name: str) -> None:
    verdict = judged[1][name]
    assert verdict.kind == CONFIRMED, verdict
    if verdict.claim.quantity:
        assert verdict.claim.holds(verdict.value or 0.0)
    else:
        assert verdict.claim.about or verdict.claim.evidence


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


@pytest.mark.parametrize("name", NOT_JUDGED_IDS)
def test_not_judged(judged: tuple[Estimate, dict[str, Verdict]], name: str) -> None:
    verdict = judged[1][name]
    assert verdict.kind == NOT_JUDGED, verdict
    assert "opinion" in verdict.reason or "too near to tell" in verdict.reason


@pytest.mark.parametrize(("name", "other"), CONTRADICTIONS.items())
def test_contradictions(judged: tuple[Estimate, dict[str, Verdict]], name: str, other: str) -> None:
    verdict = judged[1][name]
    assert verdict.kind == CONTRADICTS, verdict
    assert other in verdict.contradicts
    assert verdict.condition, "what it would take is said, too"


def test_memory_of_the_document_is_explained(judged: tuple[Estimate, dict[str, Verdict]]) -> None:
    """17.7 GB: no complete accounting. 45 GB: 12 bytes a parameter. 18 bytes would not fit."""
    assert "matches none of its readings" in judged[1]["1.5"].reason
    assert "no optimizer, 19." in judged[1]["1.5"].reason
    assert judged[1]["6.3"].shown["memory.plain_adam_gb"] == pytest.approx(68.7, abs=0.05)
    tolerances = {name: judged[1][name].claim.tolerance for name in ("1.5", "1.6", "6.3", "6.4")}
    assert tolerances == {"1.5": 0.01, "1.6": 0.01, "6.3": 0.05, "6.4": 0.05}


@pytest.mark.parametrize("name", ["6.1", "6.2"])
def test_solved_conditions_hold_at_their_edges_and_not_beyond(
    judged: tuple[Estimate, dict[str, Verdict]], document: Document, name: str
) -> None:
    verdict = judged[1][name]
    needed = verdict.needs["data.sequence"]
    assert isinstance(needed, tuple)
    low, high = needed
    assert low < high < 4096
    for sequence, holds in ((low, True), (high, True), (low - 2, False), (high + 2, False)):
        if sequence < GRID[0]:
            # Not searched: a host that launches for longer than kernels run has no lower edge.
            continue
        micro = max(round(4096 / sequence), 1) if verdict.claim.hold_tokens else 1
        overrides = [*document.overrides, f"data.sequence={sequence}", f"batch.micro={micro}"]
        run = resolve_run(overrides, 8)
        value = QUANTITIES[verdict.claim.quantity].of(Estimate.of(run, judged[0].assumptions))
        assert verdict.claim.holds(value) == holds, (sequence, value)


def test_latency_and_throughput_exclude_each_other(
    judged: tuple[Estimate, dict[str, Verdict]],
) -> None:
    """Both are solved for the length of a sequence, and need other lengths."""
    assert judged[1]["6.1"].excludes == ("6.2",)
    assert judged[1]["6.2"].excludes == ("6.1", "6.6")
    assert "never together with claim 6.2" in judged[1]["6.1"].text
    assert re.search(r"\b[89]\d times off", judged[1]["6.2"].reason)


def test_schedules_are_compared_with_their_equals(
    judged: tuple[Estimate, dict[str, Verdict]],
) -> None:
    """The best interleaved against the best plain 1F1B, same TP, PP and batch, both fit."""
    plain, best = schedules(judged[0])
    assert plain is not None and best is not None
    assert plain.layout.virtual_pipeline == 1 < best.layout.virtual_pipeline
    for one in (plain, best):
        assert (one.layout.tensor, one.layout.pipeline, one.layout.span) == (2, 4, False)
        assert one.bytes <= 64e9 and one.plan.sequences == judged[0].sequences
    assert judged[1]["2.11"].value == pytest.approx(1 - best.seconds / plain.seconds)
    assert best.layout.overrides()[2] in judged[1]["2.11"].reason


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_optimality_has_rivals_whatever_the_plan_switches_on(
    document: Document, overlap: str
) -> None:
    """The search changes overlap and recomputation, too: no option makes rivals illegal."""
    words = [f"parallel.overlap_expert_comm={overlap}"]
    subject, verdicts = open_plan(document, words, 8, Assumptions())
    by_id = {verdict.claim.id: verdict for verdict in verdicts}
    assert by_id["8.6"].kind == REFUTED and by_id["2.11"].kind in (REFUTED, NOT_JUDGED)
    overrides = by_id["8.6"].reason.partition("(")[2].partition(")")[0].split()
    faster = Estimate.of(resolve_run([*document.overrides, *words, *overrides], 8),
                         subject.assumptions)  # fmt: skip
    assert faster.fits and faster.time.sequences == subject.time.sequences
    assert by_id["8.6"].value == pytest.approx(1 - faster.time.step / subject.time.step)
    assert by_id["8.6"].value > BAND


def test_without_a_rival_nothing_is_optimal() -> None:
    """One rank has one layout, and no pipeline whose schedule could be another."""
    best = Claim("1", "", quantity="layout.gain", high=0)
    schedule = Claim("2", "", quantity="schedule.gain", high=0)
    plan = Estimate.of(resolve_run(["experiment=single"], 1), Assumptions())
    verdicts = judge(_document(best, schedule), plan, lambda _: plan)
    assert [verdict.kind for verdict in verdicts] == [NOT_JUDGED, NOT_JUDGED]


def test_the_mfu_is_searched_over_lengths_and_layouts(
    judged: tuple[Estimate, dict[str, Verdict]],
) -> None:
    """It rises with length only as far as activations fit, and more with another layout."""
    subject, reason = judged[0], judged[1]["6.5"].reason
    at, _, rest = reason.partition("data.sequence=")[2].partition(";")
    data = replace(subject.config.data, sequence=int(at.replace(",", "")))
    assert subject.under(replace(subject.config, data=data)).fits
    assert int(at.replace(",", "")) < 131072
    assert float(rest.partition("over layouts: ")[2].partition(" %")[0]) > 30


def test_evidence_is_a_test_that_exists(document: Document) -> None:
    root = Path(__file__).parents[2]
    named = [one for claim in document.claims for one in claim.evidence]
    assert len(named) >= 8
    for one in named:
        file, _, function = one.partition("::")
        assert re.search(rf"^def {function}\(", (root / file).read_text(), re.MULTILINE), one


def test_the_published_record_is_the_highest_of_the_published_runs() -> None:
    found = []
    for path in (Path(__file__).parents[2] / "benchmarks" / "published").glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        common = content.get("defaults", {}) if isinstance(content, dict) else {}
        for run in content.get("runs", []):
            facts = common | run
            if facts.get("dtype") == "bf16" and "figure" in facts:
                peak = {"mfu": 1.0, "tflops": 989.5}.get(facts.get("unit"))
                if peak and facts.get("hardware") == "h100_80gb" and not facts.get("unscored"):
                    found.append(facts["figure"] / peak)
    assert QUANTITIES["published.bf16_mfu"].of(None) == pytest.approx(max(found), abs=5e-4)  # type: ignore[arg-type]


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
    return Document("t", (), (), (Section("s", claims),))


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
    assert kinds == [CONFIRMED, REFUTED, CONFIRMED]
    assert "claim a says otherwise" in _judge(right, wrong)[1].reason


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
