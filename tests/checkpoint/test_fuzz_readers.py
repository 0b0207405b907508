"""Readers of files and words that others wrote: whatever comes in, only our errors come out."""

from __future__ import annotations

import copy
import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from moe_train.checkpoint.digests import file_entry
from moe_train.checkpoint.index import read_index
from moe_train.checkpoint.manifest import Manifest, read_manifest, verify
from moe_train.config.compose import collect, compose, typed
from moe_train.config.root import Config
from moe_train.config.schema import dotted_keys, to_mapping
from moe_train.data.manifest import dataset_file
from moe_train.data.manifest import read_manifest as read_data_manifest
from moe_train.data.prepare import Request, prepare
from moe_train.data.verify import HEADER, check_files, check_vocabulary, largest_id
from moe_train.errors import CheckpointError, ConfigError, DataError
from moe_train.planner.claims import document

LONG = {
    "checkpoint manifest": 30_000,
    "checkpoint index": 30_000,
    "data index": 20_000,
    "data manifest": 15_000,
    "typed config": 5_000,
    "overrides": 2_000,
    "claims": 5_000,
}
"""Inputs of the long run; the short one takes a hundredth."""


def test_the_long_run_is_long() -> None:
    assert sum(LONG.values()) >= 100_000


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["../x", "/etc/passwd", "__0_0.distcp", "tensors.json", "0" * 64, "1e400"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def spots(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a document can be changed."""
    results = [path]
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()  # fmt: skip # noqa: E501
    for key, value in items:
        results += spots(value, (*path, key))
    return results


@st.composite
def spoilt(draw: st.DrawFn, sound: Any) -> Any:
    """A sound document with one to three values replaced, removed or added."""
    root = {"": copy.deepcopy(sound)}
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(spots(root[""])))
        node: Any = root
        for key in ("", *place)[:-1]:
            node = node[key]
        last = ("", *place)[-1]
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if how == "remove" and place:
            del node[last]
        elif how == "add" and isinstance(node[last], dict):
            node[last][draw(st.text(max_size=8))] = draw(JSON)
        else:
            node[last] = draw(JSON)
    return root[""]


@st.composite
def bent(draw: st.DrawFn, sound: bytes) -> bytes:
    """Sound bytes with some overwritten, cut or added."""
    raw = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        how = draw(st.sampled_from(["overwrite", "overwrite", "number", "cut", "add"]))
        if how == "overwrite":
            raw[at : at + 1] = draw(st.binary(min_size=1, max_size=8))
        elif how == "number":
            value = draw(st.sampled_from([0, 1, 2**31 - 1, 2**63 - 1, 2**64 - 1, 2**40]))
            raw[at : at + 8] = value.to_bytes(8, "little")
        elif how == "cut":
            del raw[at:]
        else:
            raw += draw(st.binary(max_size=16))
    return bytes(raw)


def fuzz(name: str, long: bool, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:  # fmt: skip # noqa: E501
    """Run ``check`` on many inputs; the short run takes the same ones every time."""
    seen = 0

    @settings(
        max_examples=LONG[name] if long else LONG[name] // 100,
        deadline=None,
        database=None,
        derandomize=not long,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value: Any) -> None:
        nonlocal seen
        seen += 1
        check(value)

    run()
    # Small spaces of inputs may end early; these do not.
    assert seen >= (LONG[name] if long else LONG[name] // 100)


@pytest.fixture(
    params=[False, pytest.param(True, marks=[pytest.mark.full, pytest.mark.timeout(3600)])],
    ids=["short", "long"],
)
def long(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The default suite's size, and that of the long one."""
    return request.param


def text(value: Any) -> bytes:
    """JSON as Python writes it, NaN and lone surrogates included."""
    return json.dumps(value).encode()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step_00000002"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"12345678" * 2)
    chunks = [
        {"offset": [at], "shape": [2], "file": "__0_0.distcp", "begin": 4 * at, "length": 8}
        for at in (0, 2)
    ]
    tensors = {"w": {"dtype": "float32", "shape": [4], "chunks": chunks}}
    (folder / "tensors.json").write_bytes(text({"format": 1, "tensors": tensors}))
    Manifest(
        step=2,
        consumed_samples=8,
        consumed_tokens=8,
        model={"layers": 2},
        layout="TP1",
        world=1,
        seed=1,
        optimizer_step=2,
        optimizer_states=["exp_avg", "exp_avg_sq"],
        tokenizer="abc",
        rng_sizes=[8, 16],
        files={name: file_entry(folder / name) for name in ("__0_0.distcp", "tensors.json")},
    ).write(folder)
    read_index(folder, verify(folder))
    return folder


def test_checkpoint_manifest(checkpoint: Path, long: bool) -> None:
    path = checkpoint / "manifest.json"
    sound = path.read_bytes()

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            read_index(checkpoint, verify(checkpoint))
        except CheckpointError as error:
            assert len(str(error)) < 2000

    strategy = spoilt(json.loads(sound)).map(text) | bent(sound) | st.binary(max_size=64)
    fuzz("checkpoint manifest", long, strategy, check)


def test_checkpoint_index(checkpoint: Path, long: bool) -> None:
    path, manifest = checkpoint / "tensors.json", read_manifest(checkpoint)
    sound = path.read_bytes()

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            result = read_index(checkpoint, manifest)
        except CheckpointError:
            return
        for place in result.storage_data.values():
            assert place.relative_path == "__0_0.distcp"
            assert 0 <= place.offset <= place.offset + place.length <= 16

    strategy = spoilt(json.loads(sound)).map(text) | bent(sound) | st.binary(max_size=64)
    fuzz("checkpoint index", long, strategy, check)


def test_data_index(tmp_path: Path, long: bool) -> None:
    prefix = tmp_path / "set"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for size in (3, 1, 5):
        builder.add_document(list(range(size)), [size])
    builder.finalize(f"{prefix}.idx")
    path = dataset_file(prefix, ".idx")
    sound = path.read_bytes()

    def check(raw: bytes) -> None:
        # Another file each time: mapped pages of the last one stay what they were.
        path.unlink()
        path.write_bytes(raw)
        try:
            facts = check_files(prefix)
            check_vocabulary(facts, largest_id(facts), 5, "the test's vocabulary")
        except DataError as error:
            assert str(prefix) in error.field
            return
        assert facts.tokens * facts.dtype.itemsize == 36

    header = st.builds(
        HEADER.pack,
        st.just(sound[:9]),
        st.integers(0, 2),
        st.integers(0, 9),
        st.integers(0, 2**64 - 1) | st.integers(0, 5),
        st.integers(0, 2**64 - 1) | st.integers(0, 5),
    ).map(lambda head: head + sound[HEADER.size :])
    fuzz("data index", long, bent(sound) | header | st.binary(max_size=80), check)


def test_data_manifest(tmp_path: Path, long: bool) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "some words"}\n{"text": "more"}\n')
    prefix = tmp_path / "set"
    prepare(Request((tmp_path / "in.jsonl",), prefix))
    path = dataset_file(prefix, ".json")
    sound = path.read_bytes()

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            manifest = read_data_manifest(prefix)
            facts = check_files(prefix)
            largest_id(facts)
            assert manifest is not None
            manifest.open_tokenizer(prefix)
        except DataError:
            return

    strategy = spoilt(json.loads(sound)).map(text) | bent(sound) | st.binary(max_size=64)
    fuzz("data manifest", long, strategy, check)


def test_typed_config(long: bool) -> None:
    sound = to_mapping(compose(["experiment=twin"]))

    def check(mapping: Any) -> None:
        try:
            typed(mapping)
        except ConfigError as error:
            assert str(error)

    fuzz("typed config", long, spoilt(sound), check)


WORDS = st.text(string.printable, max_size=20) | st.text(max_size=10)
VALUES = (
    WORDS
    | SCALARS.map(str)
    | st.sampled_from(
        ["[", "{a:", "${x}", "${oc.env:HOME}", "${oc.create:{a: 1}}", "[" * 400, "9" * 5000]
        + ["choice(1,2)", "range(1)", "glob(*)", "'", '"', "\\", "${", "${.}", "${run.dir}", "a,b"]
    )
)


def test_overrides(long: bool, capsys: pytest.CaptureFixture[str]) -> None:
    keys = st.sampled_from([*dotted_keys(Config), "model", "experiment", "hydra.run.dir"]) | WORDS
    made = st.builds(
        lambda mark, key, value: f"{mark}{key}={value}",
        st.sampled_from(["", "", "+", "++", "~"]),
        keys,
        VALUES,
    )

    def check(overrides: list[str]) -> None:
        try:
            collect(overrides)
        except ConfigError as error:
            assert str(error)

    fuzz("overrides", long, st.lists(made | WORDS, min_size=1, max_size=2), check)


def test_claims(tmp_path: Path, long: bool) -> None:
    path = tmp_path / "claims.yaml"
    claim = {
        "id": "1",
        "text": "t",
        "quantity": "memory.total_gb",
        "low": 1.0,
        "equals": 2,
        "tolerance": 0.1,
        "readings": ["memory.total_gb"],
        "vary": "data.sequence",
        "under": ["parallel.expert=2"],
        "note": "n",
    }
    other = {"id": "2", "text": "t", "about": ["1"], "subject": "s"}
    sound = {"title": "t", "overrides": [], "sections": [{"title": "s", "claims": [claim, other]}]}
    path.write_text(yaml.safe_dump(sound))
    document.load(path)

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            result = document.load(path)
        except ConfigError:
            return
        for each in result.claims:
            each.holds(1.0)

    written = spoilt(sound).map(lambda value: yaml.safe_dump(value).encode("utf-8", "replace"))
    fuzz("claims", long, written | bent(yaml.safe_dump(sound).encode()), check)
