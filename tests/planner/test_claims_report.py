"""Reports of the claims: the first page, Markdown, JSON, the command, broken files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.cli import main
from moe_train.errors import ConfigError
from moe_train.parallel.shapes import Assumptions
from moe_train.planner.claims.document import Document, find, load
from moe_train.planner.claims.page import LINES, WIDTH, first_page
from moe_train.planner.claims.report import as_data, as_markdown, open_plan
from moe_train.planner.claims.verdicts import REFUTED, Verdict
from moe_train.planner.estimate import Estimate
from tests.support.claims import recomputed


@pytest.fixture(scope="module")
def document() -> Document:
    return load(find("source_document"))


@pytest.fixture(scope="module")
def judged(document: Document) -> tuple[Estimate, dict[str, Verdict]]:
    subject, verdicts = open_plan(document, [], 8, Assumptions())
    return subject, {verdict.claim.id: verdict for verdict in verdicts}


def test_the_first_page_leads_with_what_is_refuted(
    document: Document, judged: tuple[Estimate, dict[str, Verdict]]
) -> None:
    """One screen, no word broken, every claim named once, refuted ones with their sentence."""
    subject, by_id = judged
    verdicts = [by_id[claim.id] for claim in document.claims]
    lines = first_page(document, verdicts, subject).splitlines()
    assert len(lines) <= LINES and all(len(line) <= WIDTH for line in lines)
    first = next(line for line in lines if line[:1].isdigit())
    assert by_id[first.split()[0]].kind == REFUTED
    words = [word.strip(".,:;") for line in lines for word in line.split()]
    assert all(claim.id in words for claim in document.claims)


def test_figures_of_the_first_page_recompute_from_the_plan(
    document: Document, judged: tuple[Estimate, dict[str, Verdict]]
) -> None:
    data = json.loads(json.dumps(as_data(document, list(judged[1].values()), judged[0])))
    assert sum(len(one["figures"]) for one in data["first_page"]) >= 10
    recomputed(data)


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
        ("{title: t, ours: [{key: model.hiden, why: x}], sections: []}", "no config key"),
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
