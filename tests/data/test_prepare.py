"""Preparing datasets: every input kind, workers, resuming, and bad input by file and line."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moe_train.data import prepare as module
from moe_train.data import sources as source_room
from moe_train.data.encode import Encoding, encode_all
from moe_train.data.manifest import read_manifest
from moe_train.data.prepare import Progress, Request, prepare
from moe_train.data.statistics import entropy_of_counts
from moe_train.errors import DataError

TEXTS = ["one\ntwo", "Grüße 世界", "", "x" * 500, "last"]
EOD = 256


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in texts)


def write_parquet(path: Path, values: list[Any], column: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({"n": range(len(values)), column: values}), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda p: p.write_bytes(jsonl(TEXTS)[:-1] + b"\n\n  \n"),
    "a.jsonl.gz": lambda p: p.write_bytes(
        gzip.compress(jsonl(TEXTS[:2])) + gzip.compress(jsonl(TEXTS[2:]))
    ),
    "a.jsonl.zst": lambda p: p.write_bytes(
        zstandard.compress(jsonl(TEXTS[:2])) + zstandard.compress(jsonl(TEXTS[2:]))
    ),
    "a.parquet": lambda p: write_parquet(p, TEXTS),
}


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def expected(texts: list[str]) -> list[list[int]]:
    return [[*text.encode(), EOD] for text in texts if text]


@pytest.mark.parametrize("name", WRITERS)
def test_round_trip_of_documents(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    output = tmp_path / "out" / "set.v1"
    manifest = prepare(Request((tmp_path / name,), output))
    assert documents(output) == expected(TEXTS)
    flat = np.array(sum(expected(TEXTS), []))
    assert (manifest.documents, manifest.tokens) == (4, flat.size)
    assert (manifest.skipped_documents, manifest.max_token_id) == (1, EOD)
    assert (manifest.dtype, manifest.vocab_size) == ("uint16", 257)
    assert manifest.unigram_entropy == pytest.approx(entropy_of_counts(np.bincount(flat)))
    assert read_manifest(output) == manifest
    left = sorted(path.name for path in output.parent.iterdir())
    assert left == ["set.v1.bin", "set.v1.idx", "set.v1.json"], "no temporary file may remain"


def test_folder_of_mixed_sources_in_sorted_order(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / "c.txt").write_bytes(b"third\r\n")
    (folder / "b" / "z.md").write_text("second")
    (folder / "a.jsonl").write_bytes(jsonl(["first"]))
    (folder / "picture.png").write_bytes(b"\x89")
    (folder / "empty.py").write_bytes(b"")
    manifest = prepare(Request((folder,), tmp_path / "o", append_eod=False))
    assert documents(tmp_path / "o") == [list(b"first"), list(b"second"), list(b"third\r\n")]
    assert not manifest.appended_eod
    assert manifest.skipped_documents == 1


def corpus(folder: Path, files: int = 6) -> tuple[Path, ...]:
    folder.mkdir()
    for number in range(files):
        texts = [f"document {number} {line} " * (1 + line % 7) for line in range(40)]
        (folder / f"{number}.jsonl").write_bytes(jsonl(texts))
    return (folder,)


def content(prefix: Path) -> dict[str, bytes]:
    endings = (".bin", ".idx", ".json", ".tokenizer.json")
    return {e: prefix.with_name(prefix.name + e).read_bytes() for e in endings}


def test_workers_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = corpus(tmp_path / "in")
    monkeypatch.setattr("moe_train.data.encode.BATCH_ITEMS", 7)
    prepare(Request(sources, tmp_path / "one", "bpe:300"))
    prepare(Request(sources, tmp_path / "two", "bpe:300", workers=2))
    assert content(tmp_path / "one") == content(tmp_path / "two")


class Killed(BaseException):
    """Stands for the end of the process."""


def test_killed_preparation_continues_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = corpus(tmp_path / "in")
    prepare(Request(sources, tmp_path / "straight", "bpe:300"))

    def kill(progress: Progress) -> None:
        if progress.done == 3 and progress.documents > 130:
            raise Killed

    monkeypatch.setattr("moe_train.data.encode.BATCH_ITEMS", 7)
    request = Request(sources, tmp_path / "set", "bpe:300")
    with pytest.raises(Killed):
        prepare(request, kill)
    assert [p.name for p in tmp_path.glob("set*")] == ["set.partial"], "nothing half-written"

    trained: list[int] = []
    train = module.tokenizers.train_bpe
    monkeypatch.setattr(module.tokenizers, "train_bpe", lambda *a: trained.append(1) or train(*a))
    seen: list[Progress] = []
    prepare(request, lambda progress: seen.append(Progress(**vars(progress))))
    assert max(p.resumed for p in seen) == 3
    assert not trained, "the finished tokenizer must be kept"
    assert content(tmp_path / "set") == content(tmp_path / "straight")
    assert not (tmp_path / "set.partial").exists()


@pytest.mark.parametrize("change", ["content", "settings", "torn"])
def test_stale_shards_are_not_kept(tmp_path: Path, change: str) -> None:
    sources = corpus(tmp_path / "in", files=3)

    def kill(progress: Progress) -> None:
        if progress.done == 2:
            raise Killed

    with pytest.raises(Killed):
        prepare(Request(sources, tmp_path / "set"), kill)
    first = tmp_path / "in" / "0.jsonl"
    request = Request(sources, tmp_path / "set", append_eod=change != "settings")
    if change == "content":
        first.write_bytes(first.read_bytes().replace(b"document 0", b"DOCUMENT 0"))
    if change == "torn":
        for path in (tmp_path / "set.partial" / "shards").glob("*.bin"):
            path.write_bytes(path.read_bytes()[:-2])
    prepare(request)
    fresh = Request(sources, tmp_path / "fresh", append_eod=request.append_eod)
    prepare(fresh)
    assert documents(tmp_path / "set") == documents(tmp_path / "fresh")


def test_touched_but_equal_source_is_kept(tmp_path: Path) -> None:
    sources = corpus(tmp_path / "in", files=3)

    def kill(progress: Progress) -> None:
        if progress.done == 2:
            raise Killed

    with pytest.raises(Killed):
        prepare(Request(sources, tmp_path / "set"), kill)
    (tmp_path / "in" / "0.jsonl").touch()
    seen: list[int] = []
    prepare(Request(sources, tmp_path / "set"), lambda p: seen.append(p.resumed))
    assert max(seen) == 2


GOOD = jsonl(["fine"])
BAD: dict[str, tuple[str, bytes, str]] = {
    "json": ("a.jsonl", GOOD + b"{broken\n", r"a\.jsonl:2: invalid JSON"),
    "array": ("a.jsonl", GOOD * 2 + b"[1]\n", r"a\.jsonl:3: is a JSON list"),
    "key": ("a.jsonl", GOOD + b'\n{"body": "x"}\n', r"a\.jsonl:3: has no key 'text'\n.*body"),
    "type": ("a.jsonl", GOOD + b'{"text": 3}\n', r"a\.jsonl:2: 'text' is int, not a string"),
    "utf8": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', r"a\.jsonl:2: invalid UTF-8 byte 0xff"),
    "surrogate": ("a.jsonl", GOOD + b'{"text": "\\ud800"}', r"a\.jsonl:2: .*no valid Unicode"),
    "text": ("a.txt", b"fine\nline\n\xe9t\xe9", r"a\.txt:3: invalid UTF-8 byte 0xe9 at offset 10"),
    "gz": ("a.jsonl.gz", gzip.compress(GOOD * 99)[:-9], r"a\.jsonl\.gz: cannot be read"),
    "notgz": ("a.jsonl.gz", GOOD, r"a\.jsonl\.gz: cannot be read"),
    "zst": ("a.jsonl.zst", zstandard.compress(GOOD * 99)[:-5], r"a\.jsonl\.zst: cannot be read"),
    "notzst": ("a.jsonl.zst", GOOD, r"a\.jsonl\.zst: cannot be read"),
    "parquet": ("a.parquet", b"PAR1 no", r"a\.parquet: is no readable parquet"),
    "ending": ("a.docx", b"x", r"a\.docx: has an unknown ending\n.*jsonl"),
    "empty": ("a.jsonl", b"\n\n", "empty corpus"),
    "void": ("a.txt", b"", "empty corpus"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:260"])
def test_bad_input_is_named(tmp_path: Path, case: str, tokenizer: str) -> None:
    name, data, message = BAD[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        prepare(Request((tmp_path / name,), tmp_path / "o", tokenizer))
    assert not {"o.bin", "o.idx", "o.json"} & {p.name for p in tmp_path.iterdir()}


def test_bad_input_is_named_by_a_worker_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: invalid JSON") as caught:
        prepare(Request((tmp_path / "a.jsonl",), tmp_path / "o", workers=2))
    assert caught.value.fix
    assert not multiprocessing.active_children(), "the workers must not outlive the fault"


def test_worker_that_dies_is_named(tmp_path: Path) -> None:
    (source,) = corpus(tmp_path / "in", files=30)
    results = encode_all(source_room.expand([source]), Encoding("byte"), workers=2)
    next(results)
    workers = multiprocessing.active_children()
    assert 1 <= len(workers) <= 2, "the work is done in other processes"
    for worker in workers:
        worker.kill()
    with pytest.raises(DataError, match="--workers: one of 2 worker processes died"):
        list(results)


@pytest.mark.parametrize("values", [[1, 2], ["fine", None]])
def test_parquet_of_other_values(tmp_path: Path, values: list[Any]) -> None:
    write_parquet(tmp_path / "a.parquet", values)
    with pytest.raises(DataError, match=r"a\.parquet row \d: 'text' is \w+, not a string"):
        prepare(Request((tmp_path / "a.parquet",), tmp_path / "o"))
    with pytest.raises(DataError, match="no column 'body'\n.*n, text"):
        prepare(Request((tmp_path / "a.parquet",), tmp_path / "p", text_key="body"))


def test_missing_twice_named_and_existing(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    with pytest.raises(DataError, match="does not exist"):
        prepare(Request((source,), tmp_path / "o"))
    source.write_text("text")
    with pytest.raises(DataError, match="named twice"):
        prepare(Request((source, tmp_path / "." / "a.txt"), tmp_path / "o"))
    with pytest.raises(DataError, match="bpe:4096"):
        prepare(Request((source,), tmp_path / "o", "bpe:big"))
    prepare(Request((source,), tmp_path / "o"))
    with pytest.raises(DataError, match="o.json: exists"):
        prepare(Request((source,), tmp_path / "o"))
    source.write_text("other")
    prepare(Request((source,), tmp_path / "o", "bpe:257", overwrite=True))
    prepare(Request((source,), tmp_path / "o", overwrite=True))
    assert documents(tmp_path / "o") == expected(["other"])
    assert not (tmp_path / "o.tokenizer.json").exists(), "the old tokenizer must go"


def test_two_preparations_of_one_output(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    request = Request((tmp_path / "a.txt",), tmp_path / "o")
    refused: list[str] = []

    def second(progress: Progress) -> None:
        try:
            prepare(request)
        except DataError as error:
            refused.append(error.problem)

    prepare(request, second)
    assert refused and set(refused) == {"is being prepared by another process"}


def test_source_that_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.txt"
    source.write_text("text")
    monkeypatch.setattr(
        "moe_train.data.shards.file_digest", lambda p: source.write_text("longer text") and "x"
    )
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(Request((source,), tmp_path / "o"))


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be used"):
        prepare(Request((tmp_path / "a.txt",), tmp_path / "file" / "o"))


def test_lines_do_not_depend_on_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a\n" * 50, "b", "世界" * 30]).rstrip())
    wanted = list(source_room.read(source_room.expand([tmp_path / "a.jsonl"])[0]))
    for size in (1, 2, 3, 64, 65):
        monkeypatch.setattr(source_room, "CHUNK", size)
        assert list(source_room.read(source_room.expand([tmp_path / "a.jsonl"])[0])) == wanted
    assert [raw.position for raw in wanted] == [1, 2, 3]


def test_hugging_face_file_travels_with_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to learn from " * 20)
    prepare(Request((tmp_path / "a.txt",), tmp_path / "o", "bpe:280"))
    file = str(shutil.copy(tmp_path / "o.tokenizer.json", tmp_path / "mine.json"))
    manifest = prepare(Request((tmp_path / "a.txt",), tmp_path / "p", file))
    assert content(tmp_path / "o")[".bin"] == content(tmp_path / "p")[".bin"]
    tokenizer = manifest.open_tokenizer(tmp_path / "p")
    assert tokenizer.decode(documents(tmp_path / "p")[0]) == (tmp_path / "a.txt").read_text()
    (tmp_path / "p.tokenizer.json").write_text(
        module.tokenizers.train_bpe(["quite other text"], 270), encoding="utf-8"
    )
    with pytest.raises(DataError, match="is not the tokenizer"):
        manifest.open_tokenizer(tmp_path / "p")
