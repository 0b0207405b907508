"""All data of a run, opened and checked: blends of datasets, their one tokenizer, their ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_train.config.training import DataConfig
from moe_train.data import tokenizer as tokenizers
from moe_train.data.cache import cache_folder, lock
from moe_train.data.embedded import DEFAULT_TOKENIZER, embedded_corpus
from moe_train.data.manifest import dataset_file
from moe_train.data.tokenizer import Tokenizer
from moe_train.data.verify import DatasetFiles, check_files, check_vocabulary, largest_id
from moe_train.errors import DataError
from moe_train.files import write_json

SCAN_BYTES = 32 << 30
"""Files up to this size are read whole once (about a minute); above, a manifest is trusted."""


@dataclass(frozen=True)
class Part:
    """One dataset of a blend."""

    files: DatasetFiles
    weight: float | None
    """Share in the blend, not normalised; None takes the tokens' share."""
    largest_id: int

    @property
    def prefix(self) -> Path:
        """Path of the dataset's files, without their endings."""
        return self.files.prefix


@dataclass(frozen=True)
class Corpus:
    """Everything that a run reads."""

    train: tuple[Part, ...]
    valid: tuple[Part, ...]
    """Own validation data; empty where `train` is split."""
    tokenizer: Tokenizer | None
    """None for data of Megatron's own tools when no tokenizer was configured."""
    vocab_size: int
    """The tokenizer's, or one more than the largest id where there is none."""
    eod: int | None
    embedded: bool

    def check_vocabulary(self, limit: int) -> None:
        """Refuse tokens beyond a model's vocabulary of `limit` ids.

        Raises:
            DataError: file, id and offset.
        """
        for part in (*self.train, *self.valid):
            check_vocabulary(part.files, part.largest_id, limit, "the model's vocabulary")

    def describe(self) -> str:
        """One line for the console."""
        tokens = sum(part.files.tokens for part in self.train)
        what = "embedded corpus" if self.embedded else f"{len(self.train)} dataset(s)"
        by = self.tokenizer.describe() if self.tokenizer else f"vocabulary {self.vocab_size}"
        return f"{what}, {tokens:,} tokens, {by}"


def open_corpus(config: DataConfig, ready_megatron: Callable[[], None] = lambda: None) -> Corpus:
    """Open and check all data of a run; prepares the embedded corpus if none is named.

    Needs no process group, and any number of processes may call it at once.

    Args:
        ready_megatron: called before Megatron is imported, which preparing a corpus does.

    Raises:
        DataError: missing, truncated or foreign files, unlike tokenizers, ids beyond the
            tokenizer's vocabulary, bad blend entries.
    """
    cache = cache_folder(config.cache)
    embedded = not config.train
    if embedded:
        prefix = embedded_corpus(cache, config.tokenizer or DEFAULT_TOKENIZER, ready_megatron)
        train: tuple[Part, ...] = (_part(prefix, None, cache),)
    else:
        train = _parts("data.train", config.train, cache)
    valid = _parts("data.valid", config.valid, cache)
    wanted = None if embedded or config.tokenizer is None else tokenizers.load(config.tokenizer)
    tokenizer = _common_tokenizer((*train, *valid), wanted)
    if tokenizer is None:
        vocab_size = max(part.largest_id for part in (*train, *valid)) + 1
    else:
        vocab_size = tokenizer.vocab_size
        for part in (*train, *valid):
            check_vocabulary(part.files, part.largest_id, vocab_size, "the tokenizer's vocabulary")
    manifest = train[0].files.manifest
    eod = manifest.eod if manifest else tokenizer.eod if tokenizer else None
    return Corpus(train, valid, tokenizer, vocab_size, eod, embedded)


def parse_blend(field: str, entries: Sequence[str]) -> list[tuple[Path, float | None]]:
    """Prefix and weight of each ``path`` or ``weight:path``.

    Raises:
        DataError: a weight that is not above 0, or weights on some entries only.
    """
    parts: list[tuple[Path, float | None]] = []
    for entry in entries:
        match = re.fullmatch(r"([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?):(.+)", entry)
        weight: float | None = None
        path = entry
        if match:
            path = match[2]
            try:
                weight = float(match[1])
            except ValueError as error:
                raise DataError(field, f"{entry!r} has no number", "weight:path") from error
            if not 0 < weight < float("inf"):
                raise DataError(field, f"{entry!r} has weight {match[1]}", "a weight above 0")
        prefix = Path(path).expanduser()
        if prefix.suffix in (".bin", ".idx"):
            prefix = prefix.with_suffix("")
        parts.append((prefix, weight))
    if len({weight is None for _, weight in parts}) > 1:
        raise DataError(field, "only some entries have a weight", "weight:path for all, or none")
    return parts


def _parts(field: str, entries: Sequence[str], cache: Path) -> tuple[Part, ...]:
    return tuple(_part(prefix, weight, cache) for prefix, weight in parse_blend(field, entries))


def _part(prefix: Path, weight: float | None, cache: Path) -> Part:
    files = check_files(prefix)
    return Part(files, weight, _largest_id(files, cache))


def _largest_id(files: DatasetFiles, cache: Path) -> int:
    """Largest id, read from the tokens and checked against digests once per state of the files."""
    stat = files.bin_path.stat()
    index = dataset_file(files.prefix, ".idx").stat()
    if files.manifest is not None and stat.st_size > SCAN_BYTES:
        return files.manifest.max_token_id
    record = cache / "scans" / f"{stat.st_dev}-{stat.st_ino}.json"
    state = [str(files.bin_path.resolve()), stat.st_size, stat.st_mtime_ns]
    state += [index.st_size, index.st_mtime_ns]
    if files.manifest is not None:
        state += [files.manifest.bin_sha256, files.manifest.idx_sha256]
    with lock(record):
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
            if known["state"] == state:
                return int(known["largest"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no record of this state: read the tokens
        largest = largest_id(files)
        write_json(record, {"state": state, "largest": largest})
    return largest


def _common_tokenizer(parts: Sequence[Part], wanted: Tokenizer | None) -> Tokenizer | None:
    """The one tokenizer of all parts, checked against the one that the config names."""
    known = [part for part in parts if part.files.manifest is not None]
    names: dict[str, Path] = {}
    for part in known:
        assert part.files.manifest is not None
        names.setdefault(part.files.manifest.tokenizer_fingerprint, part.prefix)
    if len(names) > 1:
        (one, first), (other, second) = list(names.items())[:2]
        raise DataError(
            str(second),
            f"was prepared with another tokenizer ({other[:12]}) than {first} ({one[:12]})",
            "prepare all data of a run with one tokenizer",
        )
    if wanted is not None:
        for fingerprint, prefix in names.items():
            if fingerprint != wanted.fingerprint:
                raise DataError(
                    "data.tokenizer",
                    f"{wanted.describe()} ({wanted.fingerprint[:12]}) is not the tokenizer that "
                    f"{prefix} was prepared with ({fingerprint[:12]})",
                    "leave data.tokenizer unset, or prepare the data with this tokenizer",
                )
        return wanted
    if not known:
        return None
    manifest = known[0].files.manifest
    assert manifest is not None
    return manifest.open_tokenizer(known[0].prefix)
