"""Tokens that need no library and are the same on every machine.

Random draws come from SHA-256 in counter mode, so that no version of Python or NumPy can change
them. The text has structure to learn: each of 96 words is followed by one of four.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

from moe_train.files import write_atomically

WORDS = 96
FOLLOWERS = 4
DOCUMENTS = 64
WORDS_PER_DOCUMENT = 4096
EOD = 256
"""The byte tokenizer's end of a document."""


def _draws(name: str) -> Iterator[int]:
    """Endless bytes, the same for the same ``name``."""
    counter = 0
    while True:
        yield from hashlib.sha256(f"{name}/{counter}".encode()).digest()
        counter += 1


def documents() -> Iterator[list[int]]:
    """Token ids of each document."""
    letters, choice = _draws("letters"), _draws("text")
    overrides = [
        bytes(97 + next(letters) % 26 for _ in range(2 + next(letters) % 6)) for _ in range(WORDS)
    ]
    follows = [[next(letters) % WORDS for _ in range(FOLLOWERS)] for _ in range(WORDS)]
    for document in range(DOCUMENTS):
        word, ids = document % WORDS, []
        for _ in range(WORDS_PER_DOCUMENT):
            ids += [*overrides[word], 32]
            word = follows[word][next(choice) % FOLLOWERS]
        yield [*ids, EOD]


def write_tokens(folder: Path) -> Path:
    """Write the dataset unless it is there; returns its prefix.

    The files are Megatron's indexed dataset, version 1 (see moe_train/data/verify.py): every
    document is one sequence of uint16 ids.
    """
    prefix = folder / "tokens"
    done = folder / "done"
    if done.exists():
        return prefix
    folder.mkdir(parents=True, exist_ok=True)
    all_ids = list(documents())
    lengths = [len(ids) for ids in all_ids]
    starts = [2 * sum(lengths[:index]) for index in range(len(lengths))]
    with prefix.with_suffix(".bin").open("wb") as stream:
        for ids in all_ids:
            stream.write(struct.pack(f"<{len(ids)}H", *ids))
    count = len(lengths)
    with prefix.with_suffix(".idx").open("wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, count, count + 1))
        stream.write(struct.pack(f"<{count}i", *lengths))
        stream.write(struct.pack(f"<{count}q", *starts))
        stream.write(struct.pack(f"<{count + 1}q", *range(count + 1)))
    write_atomically(done, f"{sum(lengths)} tokens\n")
    return prefix
