"""The embedded corpus: the running Python's own standard library, prepared on first use.

Real text that is on every machine, so that a fresh checkout trains without a download.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path

from moe_train.data import tokenizer as tokenizers
from moe_train.data.cache import cache_folder, lock
from moe_train.data.verify import check_files
from moe_train.errors import DataError

DEFAULT_TOKENIZER = "bpe:4096"
"""Measured on 6 MB: 2048 / 4096 / 8192 give 1.97 / 1.74 / 1.60 M tokens and a unigram entropy
of 6.3 / 6.5 / 6.6 nats; training takes about 1.5 s for each."""

CORPUS_BYTES = 6_000_000
FILE_BYTES = 150_000
"""Larger files are left out, so that no single one (data tables) dominates a split."""

LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
)
REVISION = 1
"""Changes with the selection or the preparation, so that an old cache is not used."""


def embedded_corpus(
    cache: Path | None = None,
    tokenizer: str = DEFAULT_TOKENIZER,
    ready_megatron: Callable[[], None] = lambda: None,
) -> Path:
    """Prefix of the embedded corpus, prepared now if this machine does not have it yet.

    Any number of processes may ask at once: one prepares, the others wait for it.

    Args:
        cache: cache folder; None is the user's.
        tokenizer: byte, bpe:VOCAB or a tokenizer.json file.
        ready_megatron: called before Megatron is imported, which only the preparing process does.

    Raises:
        DataError: the standard library has no sources here, or the cache is not writable.
    """
    files = select(Path(sysconfig.get_path("stdlib")))
    spec = tokenizer
    if tokenizer != "byte" and not tokenizer.startswith("bpe:"):
        spec = tokenizers.load(tokenizer).fingerprint
    key = hashlib.sha256(f"{REVISION} {spec}".encode())
    for path in files:
        key.update(hashlib.sha256(path.read_bytes()).digest())
    name = f"python-{platform.python_version()}-{key.hexdigest()[:12]}"
    folder = cache_folder(cache) / "corpus" / name
    prefix = folder / "stdlib"
    with lock(folder):
        if not _is_whole(prefix):
            # Only the process that prepares pays for this import.
            ready_megatron()
            from moe_train.data.prepare import Request, prepare

            folder.mkdir(exist_ok=True)
            prepare(Request(tuple(files), prefix, tokenizer, overwrite=True))
    return prefix


def select(root: Path) -> list[Path]:
    """Source files of the corpus, the same for every process on this Python.

    They are ordered by the hash of their path: a random order that is always the same, so
    that the validation split (the last documents) is of the same kind as the rest.

    Raises:
        DataError: there are no sources.
    """
    files = []
    for folder, subfolders, names in root.walk():
        # Pruned here: site-packages alone may hold more files than the library.
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        files += [folder / name for name in names if name.endswith(".py") and name not in LEFT_OUT]
    files.sort(key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())
    chosen: list[Path] = []
    total = 0
    for path in files:
        size = path.stat().st_size
        if not 0 < size <= FILE_BYTES or not _is_utf8(path):
            continue
        if total + size > CORPUS_BYTES:
            break  # and not the next smaller file: the last ones would all be tiny
        chosen.append(path)
        total += size
    if not chosen:
        raise DataError(
            str(root), "has no Python sources for the embedded corpus", "set data.train=[PREFIX]"
        )
    return chosen


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, PermissionError):
        return False
    return True


def _is_whole(prefix: Path) -> bool:
    try:
        return check_files(prefix).manifest is not None
    except DataError:
        return False
