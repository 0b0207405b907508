"""The size of the vocabulary, as far as it is known before data is opened."""

from __future__ import annotations

import json
from pathlib import Path

from moe_train.config.root import Config

BYTE_VOCAB = 257
EMBEDDED_VOCAB = 4096


def vocabulary(config: Config) -> tuple[int, str]:
    """Tokens in the vocabulary, unpadded, and where the number comes from.

    A tokenizer file or the embedded corpus is not opened for a plan; a dataset's
    manifest (``PREFIX.json``) is, since it is small.
    """
    if config.model.vocab is not None:
        return config.model.vocab, "model.vocab"
    if config.data.tokenizer == "byte":
        return BYTE_VOCAB, "byte tokenizer"
    for entry in config.data.train:
        manifest = Path(entry.rpartition(":")[2] + ".json")
        if manifest.is_file() and (size := _vocab_size(manifest)) is not None:
            return size, str(manifest)
    source = "the data's tokenizer decides" if config.data.train else "embedded corpus"
    return EMBEDDED_VOCAB, f"assumed ({source}); set model.vocab to fix it"


def _vocab_size(manifest: Path) -> int | None:
    """The manifest's size, or None: opening the data reports what is wrong with the file."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    size = content.get("vocab_size") if isinstance(content, dict) else None
    return size if type(size) is int and 0 < size < 1 << 31 else None
