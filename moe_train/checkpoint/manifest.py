"""``manifest.json``: what a checkpoint is, and the size and SHA-256 of every file in it.

It is written last; a folder without a matching manifest is not a checkpoint. Format 2 had one
SHA-256 for each file instead of one for each block, and is still read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from moe_train.checkpoint.digests import Block, FileEntry, blocks, hash_range
from moe_train.config.model import ModelConfig
from moe_train.errors import CheckpointError
from moe_train.files import Count, read_validated, write_atomically

FORMAT: Final = 3
NAME = "manifest.json"
INDEX = "tensors.json"
MAX_BYTES = 64 * 2**20
_FILE = re.compile(rf"__\d{{1,9}}_\d{{1,9}}\.distcp|{re.escape(INDEX)}", re.ASCII)
_FALL_BACK = "resume from an older checkpoint: checkpoint.resume=PATH"


def _file_name(name: str) -> str:
    """The only names that a manifest may list: no other file of the folder is ever opened."""
    if not _FILE.fullmatch(name):
        raise ValueError(f"entry {name[:80]!r} is not a checkpoint's file")
    return name


@dataclass(config=ConfigDict(strict=True, extra="forbid"))
class Manifest:
    """Contents of ``manifest.json``."""

    step: Count
    consumed_samples: Count
    consumed_tokens: Count
    model: dict[str, Any]
    """Fields that fix the shapes of the weights."""
    layout: str
    world: Count
    seed: Count
    optimizer_step: Count
    optimizer_states: list[Annotated[str, Field(pattern=r"\A[a-z0-9_]{1,64}\z")]]
    """Per-parameter tensors of the optimizer and, for 16-bit weights, their fp32 copy `param`."""
    tokenizer: str
    """Fingerprint of the tokenizer that the data was prepared with."""
    rng_sizes: list[Count]
    """Bytes of each random state of a rank, in the order they were joined."""
    format: Literal[2, 3] = FORMAT
    files: dict[Annotated[str, AfterValidator(_file_name)], FileEntry] = field(default_factory=dict)
    """By name, relative to the checkpoint's folder."""

    @model_validator(mode="after")
    def _digests_cover_files(self) -> Self:
        """Refuse bytes that no digest covers: they would be loaded unverified."""
        for name, entry in self.files.items():
            block, digests = entry.get("block"), entry["sha256"]
            if self.format == 2:
                sound = block is None and isinstance(digests, str)
            else:
                sound = isinstance(digests, list) and block is not None
                sound = sound and len(digests) == -(-entry["size"] // (block or 1))
            if not sound:
                raise ValueError(f"entry {name!r} has no SHA-256 for all of its bytes")
        return self

    def write(self, folder: Path) -> None:
        """Write to ``folder`` and flush it to the disk."""
        write_atomically(folder / NAME, json.dumps(asdict(self), indent=1, sort_keys=True))


def identity(model: ModelConfig, padded_vocab: int) -> dict[str, Any]:
    """Fields that fix the shapes of the weights, which a checkpoint and a run must share.

    Layout, precision and batch sizes may differ.
    """
    return {
        "layers": model.layers,
        "hidden": model.hidden,
        "heads": model.heads,
        "kv_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "experts": model.experts,
        "expert_hidden": model.expert_hidden,
        "shared_expert_hidden": model.shared_expert_hidden,
        "padded_vocab": padded_vocab,
        "tied_embeddings": model.tied_embeddings,
        "expert_bias": model.router.expert_bias,
        # Absent where there is none, as in checkpoints of versions that had no such key.
        **({"qk_norm": model.qk_norm} if model.qk_norm != "none" else {}),
        **{name: True for method in model.router.balancing_methods for name in method.state},
    }


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a committed checkpoint.

    Raises:
        CheckpointError: missing, too large, not JSON, of another format or incomplete.
    """
    return read_validated(
        folder / NAME,
        Manifest,
        limit=MAX_BYTES,
        what=f"a manifest of format 2 or {FORMAT}",
        error=CheckpointError,
        fix="the folder is not a complete checkpoint",
    )


def verify(folder: Path, deep: bool = True, threads: int = 1) -> Manifest:
    """Check every file of a checkpoint against its manifest, in this process alone.

    Args:
        deep: compare hashes too, not sizes alone.
        threads: how many hash.

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
        for name, entry in sorted(manifest.files.items()):
            size = _plain(folder / name).stat().st_size
            if size != entry["size"]:
                raise CheckpointError(
                    str(folder / name), f"has {size} bytes, not {entry['size']}", _FALL_BACK
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
