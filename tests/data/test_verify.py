"""Checks of prepared data: every damage is named by file and offset before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from moe_train.config.training import DataConfig
from moe_train.data.corpus import open_corpus, parse_blend
from moe_train.data.manifest import dataset_file
from moe_train.data.prepare import Request, prepare
from moe_train.data.verify import HEADER, check_files
from moe_train.errors import DataError


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    (tmp_path / "in.jsonl").write_text('{"text": "some words"}\n{"text": "more"}\n')
    prepare(Request((tmp_path / "in.jsonl",), tmp_path / "set"))
    return tmp_path / "set"


def plain(prefix: Path, documents: list[list[int]], dtype: type = np.int32) -> Path:
    """Data as Megatron's own tools write it: no manifest."""
    builder = IndexedDatasetBuilder(str(prefix) + ".bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(prefix) + ".idx")
    return prefix


def config(tmp_path: Path, *train: Path | str, **more: object) -> DataConfig:
    return DataConfig(train=[str(t) for t in train], cache=str(tmp_path / "cache"), **more)


def cut(path: Path, amount: int) -> None:
    path.write_bytes(path.read_bytes()[:-amount])


def test_good_files(prefix: Path, tmp_path: Path) -> None:
    facts = check_files(prefix)
    assert (facts.documents, facts.tokens, facts.lengths.tolist()) == (2, 16, [11, 5])
    corpus = open_corpus(config(tmp_path, prefix))
    assert (corpus.vocab_size, corpus.eod, corpus.embedded) == (257, 256, False)
    assert corpus.train[0].largest_id == 256


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_missing_and_truncated_and_grown(prefix: Path, ending: str) -> None:
    path = dataset_file(prefix, ending)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(DataError, match=rf"set\{ending}: truncated at offset {len(whole) - 3}"):
        check_files(prefix)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="1 bytes more than its manifest"):
        check_files(prefix)
    path.unlink()
    with pytest.raises(DataError, match=rf"set\{ending}: does not exist"):
        check_files(prefix)


def test_damage_without_a_manifest(prefix: Path) -> None:
    dataset_file(prefix, ".json").unlink()
    whole = dataset_file(prefix, ".bin").read_bytes()
    cut(dataset_file(prefix, ".bin"), 2)
    with pytest.raises(DataError, match="truncated at offset 30: the index says 32"):
        check_files(prefix)
    dataset_file(prefix, ".bin").write_bytes(whole)
    idx = dataset_file(prefix, ".idx")
    index = idx.read_bytes()
    for bad, message in (
        (index[:-1], "truncated at offset"),
        (index[:20], "truncated at offset 20 in its header"),
        (b"X" + index[1:], "no Megatron index"),
        (index[:17] + b"\x07" + index[18:], "dtype code 7"),
        (index[: HEADER.size] + b"\xff" * 4 + index[HEADER.size + 4 :], "negative .*offset 34"),
    ):
        idx.write_bytes(bad)
        with pytest.raises(DataError, match=message):
            check_files(prefix)


@pytest.mark.parametrize("documents", [[], [[]]])
def test_empty_corpus(tmp_path: Path, documents: list[list[int]]) -> None:
    with pytest.raises(DataError, match="empty corpus"):
        check_files(plain(tmp_path / "set", documents))


def test_damaged_manifest(prefix: Path) -> None:
    path = dataset_file(prefix, ".json")
    content = json.loads(path.read_text())
    for bad, message in (
        ("{", "cannot be read"),
        (json.dumps(content | {"format": 99}), "format 1"),
        (json.dumps(content | {"odd": 1}), "'odd': Unexpected"),
    ):
        path.write_text(bad)
        with pytest.raises(DataError, match=message):
            check_files(prefix)


def test_token_beyond_vocabulary(prefix: Path, tmp_path: Path) -> None:
    corpus = open_corpus(config(tmp_path, prefix))
    corpus.check_vocabulary(257)
    with pytest.raises(DataError, match=r"set\.bin: token id 256 at offset 20 is beyond .* of 256"):
        corpus.check_vocabulary(256)
    # Damage that changes no size is seen too, although the manifest says otherwise.
    data = bytearray(dataset_file(prefix, ".bin").read_bytes())
    data[6:8] = (999).to_bytes(2, "little")
    dataset_file(prefix, ".bin").write_bytes(bytes(data))
    with pytest.raises(DataError, match="token id 999 at offset 6 is beyond the tokenizer's"):
        open_corpus(config(tmp_path, prefix))


def test_plain_megatron_data(tmp_path: Path) -> None:
    prefix = plain(tmp_path / "plain", [[5, 70000], [3]])
    corpus = open_corpus(config(tmp_path, prefix))
    assert (corpus.tokenizer, corpus.vocab_size, corpus.eod) == (None, 70001, None)
    with pytest.raises(DataError, match="token id 70000 at offset 4 is beyond the model's"):
        corpus.check_vocabulary(50304)
    with pytest.raises(DataError, match="beyond the tokenizer's vocabulary of 257"):
        open_corpus(config(tmp_path, prefix, tokenizer="byte"))
    negative = plain(tmp_path / "negative", [[5, 6], [-1]])
    with pytest.raises(DataError, match="negative token id -1 at offset 8"):
        open_corpus(config(tmp_path, negative))


def test_tokenizer_that_does_not_match(prefix: Path, tmp_path: Path) -> None:
    prepare(Request((tmp_path / "in.jsonl",), tmp_path / "other", "bpe:260"))
    other = str(tmp_path / "other")
    with pytest.raises(DataError, match="data.tokenizer: byte .* is not the tokenizer"):
        open_corpus(config(tmp_path, other, tokenizer="byte"))
    with pytest.raises(DataError, match="other: was prepared with another tokenizer"):
        open_corpus(config(tmp_path, prefix, other))
    with pytest.raises(DataError, match="other: was prepared with another tokenizer"):
        open_corpus(config(tmp_path, prefix, valid=[other]))
    same = open_corpus(config(tmp_path, other, tokenizer=other + ".tokenizer.json"))
    assert same.tokenizer is not None
    assert same.vocab_size == 260


def test_blend_entries() -> None:
    assert parse_blend("f", ["0.3:a/b", "2e1:c.bin"]) == [(Path("a/b"), 0.3), (Path("c"), 20.0)]
    assert parse_blend("f", ["a:b", "c"]) == [(Path("a:b"), None), (Path("c"), None)]
    for bad in ("0:a", "-1:a", "1.2.3:a", "1e999:a"):
        with pytest.raises(DataError, match="f: "):
            parse_blend("f", [bad])
    with pytest.raises(DataError, match="only some entries"):
        parse_blend("f", ["1:a", "b"])


def test_unwritable_cache(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="data.cache"):
        open_corpus(DataConfig(train=[str(prefix)], cache=str(tmp_path / "file" / "x")))
