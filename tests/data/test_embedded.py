"""The embedded corpus: the same for everyone, prepared once however many ask."""

from __future__ import annotations

import multiprocessing
import sys
import sysconfig
from pathlib import Path

import pytest

from moe_train.config.training import DataConfig
from moe_train.data import embedded
from moe_train.data.corpus import open_corpus
from moe_train.data.manifest import dataset_file
from moe_train.data.verify import check_files
from moe_train.errors import DataError


def ask(cache: str, mark: str) -> None:
    """What a rank does; it leaves a mark if it was the one that prepared."""
    embedded.CORPUS_BYTES = 200_000
    embedded.embedded_corpus(Path(cache), "bpe:512")
    # Only who prepares imports the preparation, and with it Megatron.
    if "moe_train.data.prepare" in sys.modules:
        Path(mark).touch()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "CORPUS_BYTES", 200_000)


def test_selection_is_of_real_sources_and_stable() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    chosen = embedded.select(root)
    assert chosen == embedded.select(root)
    sizes = [path.stat().st_size for path in chosen]
    assert 3_000_000 < sum(sizes) <= embedded.CORPUS_BYTES
    assert max(sizes) <= embedded.FILE_BYTES
    assert not any(embedded.LEFT_OUT & set(p.relative_to(root).parts) for p in chosen)
    # The last documents are the validation split: not the small left-overs.
    tail = sizes[-max(1, len(sizes) // 50) :]
    assert sum(tail) > 20_000


def test_selection_skips_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1")
    (tmp_path / "bad.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9")
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("x = 1")
    assert [path.name for path in embedded.select(tmp_path)] == ["good.py"]
    with pytest.raises(DataError, match="no Python sources"):
        embedded.select(tmp_path / "test" / "nothing")


@pytest.mark.full
def test_two_processes_at_once_prepare_once(tmp_path: Path, small: None) -> None:
    context = multiprocessing.get_context("spawn")
    marks = [tmp_path / f"mark{i}" for i in range(2)]
    cache = str(tmp_path / "cache")
    ranks = [context.Process(target=ask, args=(cache, str(mark))) for mark in marks]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert sum(mark.exists() for mark in marks) == 1
    prefix = embedded.embedded_corpus(Path(cache), "bpe:512")
    assert check_files(prefix).manifest is not None


def test_default_data_of_a_run(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data = DataConfig(tokenizer="byte")
    corpus = open_corpus(data)
    assert corpus.embedded
    assert corpus.vocab_size == 257
    assert corpus.train[0].prefix.is_relative_to(tmp_path / "xdg" / "moe_train")
    other = open_corpus(DataConfig(tokenizer="bpe:300"))
    assert other.vocab_size == 300
    assert other.train[0].prefix != corpus.train[0].prefix


def test_damaged_cache_is_prepared_again(tmp_path: Path, small: None) -> None:
    prefix = embedded.embedded_corpus(tmp_path, "byte")
    path = dataset_file(prefix, ".bin")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert embedded.embedded_corpus(tmp_path, "byte") == prefix
    assert path.read_bytes() == whole
