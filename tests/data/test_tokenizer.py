"""Tokenizers: round trips, fingerprints, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.data import tokenizer as tokenizers
from moe_train.errors import DataError

TEXTS = ["def f(x):\n    return x + 1\n", "Grüße, 世界 \U0001f600", "a <|endoftext|> b", " "]


@pytest.fixture(scope="module")
def trained() -> str:
    return tokenizers.train_bpe(TEXTS * 5, 300)


@pytest.fixture
def bpe(trained: str, tmp_path: Path) -> tokenizers.Tokenizer:
    (tmp_path / "tokenizer.json").write_text(trained, encoding="utf-8")
    return tokenizers.load(str(tmp_path))


@pytest.mark.parametrize("text", [*TEXTS, ""])
def test_round_trip(bpe: tokenizers.Tokenizer, text: str) -> None:
    for tokenizer in (tokenizers.load("byte"), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eod not in ids, "text must not be able to end a document"
        assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_training_depends_on_texts_only(trained: str) -> None:
    assert tokenizers.train_bpe(iter(TEXTS * 5), 300) == trained
    assert tokenizers.train_bpe(TEXTS * 5, 290) != trained


def test_fingerprint_is_of_the_content(
    trained: str, bpe: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    again = tmp_path / "again.json"
    again.write_text(json.dumps(json.loads(trained)), encoding="utf-8")
    assert tokenizers.load(str(again)).fingerprint == bpe.fingerprint
    other = tmp_path / "other.json"
    other.write_text(tokenizers.train_bpe(TEXTS * 5, 290), encoding="utf-8")
    assert tokenizers.load(str(other)).fingerprint != bpe.fingerprint


def test_eod_by_name_and_by_convention(bpe: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = str(tmp_path / "tokenizer.json")
    assert bpe.eod == 0
    assert tokenizers.load(path, eod="a").eod == bpe.encode("a")[0]
    with pytest.raises(DataError, match="no token '<nope>'.*\n.*endoftext"):
        tokenizers.load(path, eod="<nope>")


@pytest.mark.parametrize("content", ["not json", '{"model": 1}', "[]"])
def test_broken_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="tokenizer.json"):
        tokenizers.load(str(path))


def test_unknown_specification_and_tiny_vocabulary() -> None:
    with pytest.raises(DataError, match="neither byte nor a file"):
        tokenizers.load("gpt-nothing")
    with pytest.raises(DataError, match="bpe:257"):
        tokenizers.train_bpe(["x"], 100)
