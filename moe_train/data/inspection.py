"""What a prepared dataset holds, for people and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moe_train.data import tokenizer as tokenizers
from moe_train.data.entropy import count_tokens, entropy_of_counts
from moe_train.data.sources import digest
from moe_train.data.verify import check_files, check_vocabulary
from moe_train.errors import DataError

SAMPLE_TOKENS = 200


def inspect(
    prefix: Path, samples: int = 0, tokenizer: str | None = None, verify: bool = False
) -> dict[str, Any]:
    """Counts, entropy and decoded beginnings of documents.

    Args:
        prefix: the dataset.
        samples: documents to decode, evenly spread.
        tokenizer: for data without a manifest: what to decode with.
        verify: also compare the files' sha256 with the manifest.

    Raises:
        DataError: missing, truncated or changed files, or a foreign tokenizer.
    """
    facts = check_files(prefix)
    manifest = facts.manifest
    if verify:
        if manifest is None:
            raise DataError(str(prefix), "has no manifest to verify against", "prepare it again")
        for ending, expected in ((".bin", manifest.bin_sha256), (".idx", manifest.idx_sha256)):
            path = prefix.with_name(prefix.name + ending)
            if digest(path) != expected:
                raise DataError(str(path), "sha256 differs from the manifest", "restore the file")
    decoder = manifest.open_tokenizer(prefix) if manifest else None
    if tokenizer is not None:
        given = tokenizers.load(tokenizer)
        if decoder is not None and given.fingerprint != decoder.fingerprint:
            raise DataError(
                "--tokenizer", f"is not the one that {prefix} was prepared with", "leave it out"
            )
        decoder = given
    counts = count_tokens(facts.chunks())
    if decoder is not None:
        check_vocabulary(facts, counts.size - 1, decoder.vocab_size, "the tokenizer's vocabulary")
    sequences = facts.lengths.size
    report: dict[str, Any] = {
        "prefix": str(prefix),
        "documents": facts.documents,
        "sequences": sequences,
        "tokens": facts.tokens,
        "dtype": facts.dtype.name,
        "max_token_id": counts.size - 1,
        "distinct_tokens": int((counts > 0).sum()),
        "unigram_entropy": entropy_of_counts(counts),
        "shortest": int(facts.lengths.min()),
        "median": float(np.median(facts.lengths)),
        "longest": int(facts.lengths.max()),
        "tokenizer": decoder.describe() if decoder else None,
        "vocab_size": decoder.vocab_size if decoder else None,
        "manifest": manifest is not None,
    }
    if samples:
        ids = np.memmap(facts.bin_path, dtype=facts.dtype, mode="r")
        starts = np.concatenate([[0], np.cumsum(facts.lengths, dtype=np.int64)[:-1]])
        chosen = np.unique(np.linspace(0, sequences - 1, min(samples, sequences)).astype(int))
        report["samples"] = []
        for number in chosen.tolist():
            length = int(facts.lengths[number])
            shown = ids[starts[number] : starts[number] + min(length, SAMPLE_TOKENS)].tolist()
            report["samples"].append(
                {
                    "sequence": number,
                    "tokens": length,
                    "ids": shown[:16],
                    "text": decoder.decode(shown) if decoder else None,
                }
            )
    return report
