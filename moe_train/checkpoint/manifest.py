"""The manifest: what a checkpoint is, and size and SHA-256 of every file in it, block by block.

It is JSON, written last; a folder without a matching manifest is not a checkpoint. Format 2 had
one SHA-256 for each file, and is still read.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_train.checkpoint.digests import Block, blocks, hash_range
from moe_train.errors import CheckpointError
from moe_train.features.optimizers import OPTIMIZERS

FORMAT = 3
READABLE = (2, FORMAT)
NAME = "manifest.json"
INDEX = "tensors.json"
MAX_BYTES = 64 * 2**20
_FILE = re.compile(rf"__\d{{1,9}}_\d{{1,9}}\.distcp|{re.escape(INDEX)}", re.ASCII)
"""The only names that a manifest may list: no other file of the folder is ever opened."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STATES = {"param"}.union(*(one.state_names for one in OPTIMIZERS.values()))


@dataclass
class Manifest:
    """Contents of ``manifest.json``."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    model: dict[str, Any]
    """Fields that fix the shapes of the weights."""
    layout: str
    world: int
    seed: int
    optimizer_step: int
    optimizer_states: list[str]
    """Per-parameter tensors of the optimizer and, for 16-bit weights, their fp32 copy `param`."""
    tokenizer: str
    """Fingerprint of the tokenizer that the data was prepared with."""
    rng_sizes: list[int]
    """Bytes of each random state of a rank, in the order they were joined."""
    format: int = FORMAT
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Relative name -> {size, block, sha256: [of each block]}; format 2: {size, sha256}."""

    def write(self, folder: Path) -> None:
        """Write to ``folder`` and flush it to the disk."""
        path = folder / NAME
        with open(path, "w", encoding="utf-8") as out:
            json.dump(asdict(self), out, indent=1, sort_keys=True)
            out.flush()
            os.fsync(out.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a committed checkpoint.

    Raises:
        CheckpointError: missing, too large, not JSON, of another format or incomplete.
    """
    path = folder / NAME
    raw = read_json(path, MAX_BYTES)
    found = raw.get("format") if isinstance(raw, dict) else None
    if type(found) is not int or found not in READABLE:
        raise CheckpointError(str(path), f"is not a manifest of format {READABLE[0]} or {FORMAT}")
    try:
        manifest = Manifest(**raw)
    except TypeError as problem:
        raise CheckpointError(str(path), f"has missing or unknown fields: {problem}") from problem
    _check_types(path, manifest)
    return manifest


def read_json(path: Path, limit: int) -> Any:
    """Content of a JSON file of at most ``limit`` bytes.

    Raises:
        CheckpointError: no plain file, too large, or not JSON.
    """
    try:
        # A link could lead out of the folder, and a pipe or a device would never end.
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(str(path), "is not a plain file")
        if found.st_size > limit:
            raise CheckpointError(str(path), f"has {found.st_size} bytes, more than {limit}")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise CheckpointError(
            str(path), f"cannot be read: {problem}", "the folder is not a complete checkpoint"
        ) from problem


def _check_types(path: Path, manifest: Manifest) -> None:
    numbers = ("step", "consumed_samples", "consumed_tokens", "world", "seed", "optimizer_step")
    for name in numbers:
        value = getattr(manifest, name)
        if type(value) is not int or value < 0:
            raise CheckpointError(str(path), f"{name} is {value!r}, not a count")
    if not isinstance(manifest.model, dict) or not isinstance(manifest.files, dict):
        raise CheckpointError(str(path), "model and files must be objects")
    texts = (manifest.layout, manifest.tokenizer)
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointError(str(path), "layout and tokenizer must be texts")
    states, sizes = manifest.optimizer_states, manifest.rng_sizes
    if not isinstance(states, list) or not all(
        isinstance(state, str) and state in _STATES for state in states
    ):
        raise CheckpointError(str(path), f"optimizer_states are not among {sorted(_STATES)}")
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise CheckpointError(str(path), "rng_sizes must be counts")
    for name, facts in manifest.files.items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(str(path), f"entry {name[:80]!r} is not a checkpoint's file")
        described = _in_blocks(facts) if manifest.format == FORMAT else _as_one(facts)
        if not described:
            raise CheckpointError(str(path), f"entry {name[:80]!r} has no size and SHA-256")


def _as_one(facts: Any) -> bool:
    known = isinstance(facts, dict) and facts.keys() == {"size", "sha256"}
    return known and _is_count(facts["size"]) and _is_digest(facts["sha256"])


def _in_blocks(facts: Any) -> bool:
    if not isinstance(facts, dict) or facts.keys() != {"size", "block", "sha256"}:
        return False
    size, block, digests = facts["size"], facts["block"], facts["sha256"]
    if not _is_count(size) or not _is_count(block) or block == 0 or not isinstance(digests, list):
        return False
    # Bytes that no digest covers would be taken as they are.
    return len(digests) == -(-size // block) and all(map(_is_digest, digests))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def verify(folder: Path, deep: bool = True, threads: int = 1) -> Manifest:
    """Check every file of a checkpoint against its manifest, in this process alone.

    Args:
        deep: compare hashes too, not sizes alone.
        threads: that hash.

    Raises:
        CheckpointError: names the first file that is missing, unlisted, a link, or different.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if deep:
        check_blocks(folder, blocks(manifest.files), threads)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare names and sizes of a checkpoint's files with its manifest.

    Raises:
        CheckpointError: names the first file that is missing, unlisted, a link, or of another size.
    """
    if INDEX not in manifest.files:
        raise CheckpointError(str(folder / NAME), f"does not list {INDEX}", _FALL_BACK)
    try:
        for path in sorted(folder.iterdir()):
            if path.name != NAME and path.name not in manifest.files:
                raise CheckpointError(
                    str(path), "is not in the manifest", "remove it if it is yours"
                )
        for name, facts in sorted(manifest.files.items()):
            size = _plain(folder / name).stat().st_size
            if size != facts["size"]:
                raise CheckpointError(
                    str(folder / name), f"has {size} bytes, not {facts['size']}", _FALL_BACK
                )
    except OSError as problem:
        raise _unreadable(folder, problem) from problem


def check_blocks(folder: Path, wanted: Sequence[Block], threads: int = 1) -> None:
    """Compare the SHA-256 of blocks of a checkpoint's files; hashing lets other threads run.

    Raises:
        CheckpointError: names the first block that cannot be read or differs.
    """

    def check(block: Block) -> None:
        # Who hashes may be another rank than the one that compared names and sizes.
        path = _plain(folder / block.file)
        with open(path, "rb", buffering=0) as stream:
            if hash_range(stream, block.begin, block.end) != block.sha256:
                place = f"in bytes {block.begin} to {block.end}"
                raise CheckpointError(str(path), f"does not match its SHA-256 {place}", _FALL_BACK)

    pool = ThreadPoolExecutor(threads, "hash") if threads > 1 else None
    try:
        for _ in (pool.map if pool else map)(check, wanted):
            pass
    except OSError as problem:
        raise _unreadable(folder, problem) from problem
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _plain(path: Path) -> Path:
    """``path``, if it is a file: a link could lead out of the folder."""
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(str(path), "is missing or not a plain file", _FALL_BACK)
    return path


def _unreadable(folder: Path, problem: OSError) -> CheckpointError:
    return CheckpointError(str(folder), f"cannot be read: {problem}", _FALL_BACK)


_FALL_BACK = "resume from an older checkpoint: checkpoint.resume=PATH"


def merged(parts: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One ``files`` table from the ranks' parts."""
    return {name: facts for part in parts for name, facts in part.items()}
