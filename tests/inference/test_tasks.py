"""Files of an evaluation, the rows that they become, and the figures from their scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moe_train.data.tokenizer import ByteTokenizer
from moe_train.errors import DataError
from moe_train.inference import tasks
from moe_train.inference.tasks import ChoiceTask, Question, Row, TextTask, windows

BYTES = ByteTokenizer()


@pytest.mark.parametrize("size", [2, 4, 5, 6, 9, 23])
def test_windows_score_every_token_but_the_first(size: int) -> None:
    tokens = list(range(100, 100 + size))
    rows = list(windows(tokens, 4))
    scored = [token for row in rows for token in row.tokens[len(row.tokens) - row.scored :]]
    assert scored == tokens[1:]
    assert all(len(row.tokens) <= 5 for row in rows)


def test_figures_of_domains_make_up_the_whole() -> None:
    task = TextTask([("a", "x" * 10), ("b", "y" * 4), ("a", "z" * 3)], BYTES, 4, "file")
    scores = [-1.0 * row.scored for row in task.rows[:-1]] + [-6.0]
    result = task.result(scores)
    assert result["tokens"] == 9 + 3 + 2
    assert result["domains"]["b"]["loss"] == 1.0
    assert result["domains"]["a"]["loss"] == (9 + 6) / 11
    assert result["loss"] == (9 + 3 + 6) / 14
    assert result["perplexity"] == pytest.approx(math.exp(18 / 14))


def test_choices_are_scored_after_a_space() -> None:
    questions = [Question("ab", ("c", "dd"), 1), Question("tail  ", ("e", "f"), 0)]
    task = ChoiceTask(questions, BYTES, 32, "file")
    assert task.rows == [
        Row(tuple(b"ab c"), 2),
        Row(tuple(b"ab dd"), 3),
        # Spaces at the end of a context go with the continuation.
        Row(tuple(b"tail   e"), 4),
        Row(tuple(b"tail   f"), 4),
    ]
    result = task.result([-3.0, -4.0, -1.0, -2.0])
    assert (result["acc"], result["acc_norm"], result["questions"]) == (0.5, 1.0, 2)
    assert (result["tokens"], result["loss"]) == (3 + 4, 5 / 7)
    assert result["acc_stderr"] == pytest.approx(0.5) and result["acc_norm_stderr"] == 0


def test_long_questions_keep_their_end_and_empty_contexts_begin_a_document() -> None:
    task = ChoiceTask([Question("0123456789", ("ab", "c"), 0)], BYTES, 5, "file")
    assert task.rows[0] == Row(tuple(b"789 ab"), 3)
    task = ChoiceTask([Question("", ("ab", "c"), 0)], BYTES, 8, "file")
    assert task.rows[0] == Row((256, *b" ab"), 3)


@pytest.mark.parametrize(
    ("read", "line"),
    [
        ("read_domains", '{"domain": "a"}'),
        ("read_domains", '{"domain": "", "text": "x"}'),
        ("read_domains", "[1]"),
        ("read_domains", "{"),
        ("read_questions", '{"context": "a", "choices": ["b"], "answer": 0}'),
        ("read_questions", '{"context": "a", "choices": ["b", ""], "answer": 0}'),
        ("read_questions", '{"context": "a", "choices": ["b", "c"], "answer": 2}'),
        ("read_questions", '{"context": "a", "choices": ["b", "c"], "answer": true}'),
        ("read_questions", '{"context": 1, "choices": ["b", "c"], "answer": 1}'),
        ("read_prompts", '{"text": "a"}'),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, read: str, line: str) -> None:
    path = tmp_path / "file.jsonl"
    good = '{"domain": "a", "text": "b", "context": "c", "choices": ["d", "e"], "answer": 1, '
    path.write_text(good + '"prompt": "f"}\n\n' + line + "\n")
    with pytest.raises(DataError) as refusal:
        getattr(tasks, read)(path)
    assert refusal.value.field == f"{path}:3"


def test_prompts_are_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo words\n")
    assert tasks.read_prompts(tmp_path / "a.txt") == ["one", "two words"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\\ntwo"}\n')
    assert tasks.read_prompts(tmp_path / "a.jsonl") == ["one\ntwo"]
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError):
        tasks.read_prompts(tmp_path / "empty")


def test_nothing_to_score_is_refused() -> None:
    for texts in ([], [("a", "x")], [("a", "xy"), ("b", "")]):
        with pytest.raises(DataError):
            TextTask(texts, BYTES, 4, "file")
    with pytest.raises(DataError):
        ChoiceTask([], BYTES, 4, "file")
