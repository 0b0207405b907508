"""Hostile and damaged data: named by file and place, never executed, told by all ranks as one."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train.config.training import DataConfig
from moe_train.data import cache
from moe_train.data.corpus import open_corpus
from moe_train.data.manifest import BLOCK, MAX_BYTES, dataset_file, read_manifest
from moe_train.data.prepare import Request, prepare
from moe_train.data.verify import HEADER, check_files
from moe_train.errors import EXIT_DATA, DataError
from moe_train.testing.runs import QUIET, train_run
from moe_train.testing.world import run_world

SMALL = [
    *("parallel=single", "recompute=none", "batch.micro=1", "batch.global=2"),
    *("model.layers=2", "model.hidden=32", "model.heads=4", "model.head_dim=8"),
    *("model.experts=4", "model.expert_hidden=32", "data.sequence=32"),
    *("train.eval_every=0", "checkpoint.every=0", "train.steps=2"),
]
TEXT = "some words that are made of bytes, and then a few more of them. " * 40


class Touch:
    """Unpickled, it creates a folder: code ran."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def as_pickle(canary: Path) -> bytes:
    return pickle.dumps(Touch(canary))


def as_array(canary: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Touch(canary)], dtype=object), allow_pickle=True)
    return out.getvalue()


def made(folder: Path, tokenizer: str = "byte") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"{number} {TEXT}"}) for number in range(20)]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    prepare(Request((folder / "in.jsonl",), folder / "set", tokenizer))
    return folder / "set"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return made(tmp_path / "data")


def opened(prefix: Path, cache: Path) -> None:
    open_corpus(DataConfig(train=[str(prefix)], cache=str(cache)))


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_every_flipped_byte_is_seen(prefix: Path, tmp_path: Path) -> None:
    """In the tokens and in each part of the index; seen again after the first look."""
    opened(prefix, tmp_path / "cache")
    size = {ending: dataset_file(prefix, ending).stat().st_size for ending in (".bin", ".idx")}
    places = [(".bin", at) for at in (0, size[".bin"] // 2, size[".bin"] - 1)]
    places += [(".idx", at) for at in range(0, size[".idx"], 37)]
    for ending, at in places:
        path = dataset_file(prefix, ending)
        whole = path.read_bytes()
        flip(path, at)
        with pytest.raises(DataError, match="offset|SHA-256") as caught:
            opened(prefix, tmp_path / "cache")
        assert caught.value.field == str(path), (ending, at)
        path.write_bytes(whole)
    opened(prefix, tmp_path / "cache")


def test_a_flip_is_placed_in_its_block(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_train.data import manifest, verify

    for module in (manifest, verify):
        monkeypatch.setattr(module, "BLOCK", 4096)
    other = made(tmp_path / "blocks")
    output = read_manifest(other)
    assert output is not None and len(output.bin_blocks) == -(-output.bin_bytes // 4096) > 2
    flip(dataset_file(other, ".bin"), 5000)
    with pytest.raises(DataError, match="between offsets 4096 and 8192"):
        opened(other, tmp_path / "cache")


def test_data_of_before_the_blocks(prefix: Path, tmp_path: Path) -> None:
    path = dataset_file(prefix, ".json")
    content = json.loads(path.read_text())
    assert len(content.pop("bin_blocks")) == 1 and content["bin_bytes"] < BLOCK
    path.write_text(json.dumps(content))
    opened(prefix, tmp_path / "cache")
    flip(dataset_file(prefix, ".bin"), 10)
    with pytest.raises(DataError, match="does not match the SHA-256"):
        opened(prefix, tmp_path / "cache")


def test_index_that_leads_astray(prefix: Path) -> None:
    """Without a manifest the structure itself must hold: every place and document bound."""
    dataset_file(prefix, ".json").unlink()
    idx = dataset_file(prefix, ".idx")
    whole = idx.read_bytes()
    sequences = check_files(prefix).lengths.size
    begins = HEADER.size + 4 * sequences
    bounds = begins + 8 * sequences
    for at, value, message in (
        (begins + 8, 10**12, f"wrong place of a sequence at offset {begins + 8}"),
        (begins, -4, f"wrong place of a sequence at offset {begins}"),
        (bounds, 1, "do not span|out of order"),
        (bounds + 8 * sequences, 10**9, f"do not span the sequences .offset {bounds + 160}"),
        (bounds + 8, 10**9, f"out of order at offset {bounds + 16}"),
    ):
        raw = bytearray(whole)
        raw[at : at + 8] = value.to_bytes(8, "little", signed=True)
        idx.write_bytes(raw)
        with pytest.raises(DataError, match=message):
            check_files(prefix)


def test_manifest_that_is_no_manifest(prefix: Path) -> None:
    path = dataset_file(prefix, ".json")
    content = json.loads(path.read_text())
    odd: dict[str, Any] = {
        "documents": "1",
        "bin_bytes": -1,
        "idx_bytes": 1.5,
        "tokens": 2**70,
        "vocab_size": True,
        "tokenizer": 3,
        "eod": "x",
        "sources": {},
        "bin_blocks": ["0"] * 9,
        "unigram_entropy": None,
    }
    for name, value in odd.items():
        path.write_text(json.dumps(content | {name: value}))
        with pytest.raises(DataError, match=f"manifest of format 1: .*{name}"):
            read_manifest(prefix)
    with path.open("r+b") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(DataError, match="more than"):
        read_manifest(prefix)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a plain file"):
        read_manifest(prefix)


def test_pickles_among_the_indices(tmp_path: Path) -> None:
    folder, canary = tmp_path / "indices", tmp_path / "canary"
    folder.mkdir()
    np.save(folder / "good.npy", np.arange(4))
    cache.record_indices(folder)
    cache.refuse_pickles(folder)
    assert cache.indices_unchanged(folder)
    for form in (as_pickle, as_array):
        (folder / "bad.npy").write_bytes(form(canary))
        with pytest.raises(DataError, match="bad.npy: holds a pickle"):
            cache.refuse_pickles(folder)
        (folder / "bad.npy").unlink()
    (folder / "link.npy").symlink_to(folder / "good.npy")
    with pytest.raises(DataError, match="link.npy: is not a plain file"):
        cache.refuse_pickles(folder)
    (folder / "link.npy").unlink()
    # Torn by a killed build: no attack, it is built again.
    (folder / "good.npy").write_bytes((folder / "good.npy").read_bytes()[:-3])
    cache.refuse_pickles(folder)
    assert not cache.indices_unchanged(folder)
    (folder / cache.RECORD).unlink()
    assert not cache.indices_unchanged(folder)
    assert not canary.exists()


def _places(prefix: Path, cache: Path) -> list[Path]:
    data = [dataset_file(prefix, ending) for ending in (".bin", ".idx", ".json", ".tokenizer.json")]
    return [*data, *sorted(cache.rglob("*.npy")), *sorted(cache.rglob("*.json"))]


def _hostile(rank: int, world: int, scratch: str) -> dict[str, tuple[int, str, bool]]:
    """A pickle in place of every file that a run reads of its data, in one process."""
    from moe_train.run.main import main

    home = Path(scratch)
    prefix, cache = made(home / "data", "bpe:300"), home / "cache"
    overrides = [
        *QUIET,
        *SMALL,
        f"run.dir={scratch}",
        f"data.train=[{prefix}]",
        f"data.cache={cache}",
    ]
    assert main([*overrides, "run.name=first"]) == 0
    result = {}
    for form in (as_pickle, as_array):
        for path in _places(prefix, cache):
            canary = home / f"canary{len(result)}"
            whole = path.read_bytes()
            path.write_bytes(form(canary))
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                code = main([*overrides, f"run.name=r{len(result)}"])
            result[f"{form.__name__} {path.relative_to(home)}"] = (
                code,
                output.getvalue(),
                canary.exists(),
            )
            path.write_bytes(whole)
    return result


@pytest.mark.world
def test_a_pickle_in_every_place(tmp_path: Path) -> None:
    (outcomes,) = run_world(_hostile, 1, str(tmp_path))
    arrays = [case for case in outcomes if case.endswith(".npy")]
    # Document, sample and shuffle index, each in both forms.
    assert len(arrays) >= 6 and len(outcomes) > 14
    for case, (code, output, sang) in outcomes.items():
        assert not sang, f"{case}: code of the data ran"
        # What the cache says of files is rebuilt where it is not readable.
        again = case.split()[1].startswith("cache/") and case.endswith(".json")
        assert code == (0 if again else EXIT_DATA), f"{case}: {output}"
        assert "Traceback" not in output, f"{case}: {output}"
        if not again:
            name = case.rpartition("/")[2]
            assert output.count("moe_train: ") == 1 and name in output, f"{case}: {output}"


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-3]), "set.bin: truncated at offset"),
    "flipped": (lambda p: flip(p, 100), "set.bin: does not match the SHA-256"),
    "missing": (lambda p: p.unlink(), "set.bin: does not exist"),
    "id out of range": (
        lambda p: p.write_bytes(b"\xff\x7f" + p.read_bytes()[2:]),
        "set.bin: token id 32767 at offset 0",
    ),
}


@pytest.mark.world
@pytest.mark.parametrize("kind", DAMAGE)
def test_one_message_for_all_ranks(kind: str, prefix: Path, tmp_path: Path) -> None:
    spoil, arguments = DAMAGE[kind]
    spoil(dataset_file(prefix, ".bin"))
    overrides = [*SMALL, "parallel.expert=2", f"data.train=[{prefix}]"]
    run = train_run(tmp_path / "r", [*overrides, f"data.cache={tmp_path}/cache"], world=2)
    output = (tmp_path / "r.log").read_text()
    assert run.codes == [EXIT_DATA] * 2, output
    assert output.count(arguments) == 1 and "Traceback" not in output, output


@pytest.mark.parametrize("spoil", ["bin", "idx", "done"])
def test_a_shard_that_was_damaged_while_it_waited(spoil: str, tmp_path: Path) -> None:
    """A killed preparation goes on with sound shards only: the result is that of one go."""
    sources = []
    for number in range(4):
        sources.append(tmp_path / f"in{number}.jsonl")
        sources[-1].write_text(json.dumps({"text": f"{number} {TEXT}"}) + "\n")
    prepare(Request(tuple(sources), tmp_path / "whole"))

    class Killed(Exception):
        pass

    def kill(progress: Any) -> None:
        if progress.done == 2:
            raise Killed

    with pytest.raises(Killed):
        prepare(Request(tuple(sources), tmp_path / "set"), kill)
    shard = sorted((tmp_path / "set.partial/shards").glob(f"*.{spoil}"))[0]
    flip(shard, shard.stat().st_size // 2)
    resumed: list[int] = []
    prepare(Request(tuple(sources), tmp_path / "set"), lambda p: resumed.append(p.resumed))
    assert max(resumed) == 1
    for ending in (".bin", ".idx"):
        whole = dataset_file(tmp_path / "whole", ending).read_bytes()
        assert dataset_file(tmp_path / "set", ending).read_bytes() == whole


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """No marker file: a killed job would leave it, and the next one wait for ever."""

    def without(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", without)
    reason = f"cannot be locked: {os.strerror(code)}"
    with pytest.raises(DataError, match=f"data.cache: .*{reason}\n.*data.cache=FOLDER"):
        cache.lock(tmp_path / "index").__enter__()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=f"--output: .*{reason}\n.*choose an --output"):
        prepare(Request((tmp_path / "a.txt",), tmp_path / "o"))


def test_a_lock_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(DataError, match="index.lock cannot be locked"):
        cache.lock(tmp_path / "index").__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be locked: Not a directory"):
        cache.lock(tmp_path / "file" / "folder" / "index").__enter__()
    assert not (tmp_path / "victim").exists()
