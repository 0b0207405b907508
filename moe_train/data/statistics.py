"""Statistics of datasets: counts, unigram entropy, decoded samples.

Unigram entropy is the loss of a model that knows only how often each token occurs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data import tokenizer as tokenizers
from moe_train.data.verify import check_files, check_vocabulary
from moe_train.errors import DataError
from moe_train.files import file_digest

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
    files = check_files(prefix)
    manifest = files.manifest
    if verify:
        if manifest is None:
            raise DataError(str(prefix), "has no manifest to verify against", "prepare it again")
        for ending, expected in ((".bin", manifest.bin_sha256), (".idx", manifest.idx_sha256)):
            path = prefix.with_name(prefix.name + ending)
            if file_digest(path) != expected:
                raise DataError(str(path), "sha256 differs from the manifest", "restore the file")
    decoder = manifest.open_tokenizer(prefix) if manifest else None
    if tokenizer is not None:
        given = tokenizers.load(tokenizer)
        if decoder is not None and given.fingerprint != decoder.fingerprint:
            raise DataError(
                "--tokenizer", f"is not the one that {prefix} was prepared with", "leave it out"
            )
        decoder = given
    counts = count_tokens(files.chunks())
    if decoder is not None:
        check_vocabulary(files, counts.size - 1, decoder.vocab_size, "the tokenizer's vocabulary")
    sequences = files.lengths.size
    report: dict[str, Any] = {
        "prefix": str(prefix),
        "documents": files.documents,
        "sequences": sequences,
        "tokens": files.tokens,
        "dtype": files.dtype.name,
        "max_token_id": counts.size - 1,
        "distinct_tokens": int((counts > 0).sum()),
        "unigram_entropy": entropy_of_counts(counts),
        "shortest": int(files.lengths.min()),
        "median": float(np.median(files.lengths)),
        "longest": int(files.lengths.max()),
        "tokenizer": decoder.describe() if decoder else None,
        "vocab_size": decoder.vocab_size if decoder else None,
        "manifest": manifest is not None,
    }
    if samples:
        ids = np.memmap(files.bin_path, dtype=files.dtype, mode="r")
        starts = np.concatenate([[0], np.cumsum(files.lengths, dtype=np.int64)[:-1]])
        chosen = np.unique(np.linspace(0, sequences - 1, min(samples, sequences)).astype(int))
        report["samples"] = []
        for number in chosen.tolist():
            length = int(files.lengths[number])
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


def entropy_of_counts(counts: npt.NDArray[Any]) -> float:
    """Shannon entropy in nats of a histogram; 0.0 for an empty one.

    Args:
        counts: occurrences of each id, shape [vocabulary].
    """
    seen = counts[counts > 0].astype(np.float64)
    if seen.size == 0:
        return 0.0
    shares = seen / seen.sum()
    return float(-(shares * np.log(shares)).sum() + 0.0)


def count_tokens(chunks: Iterable[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    """Histogram of non-negative ids over several arrays, shape [largest id + 1]."""
    counts = np.zeros(0, np.int64)
    for chunk in chunks:
        total = np.bincount(chunk.reshape(-1), minlength=counts.size)
        total[: counts.size] += counts
        counts = total
    return counts


def dataset_entropy(dataset: Sequence[Any], samples: int | None = None) -> float:
    """Entropy in nats per token of the labels that a dataset's samples predict.

    A model is compared with this on the same samples: their loss below it means that the
    model uses context.

    Args:
        dataset: items with a ``labels`` integer tensor of shape [sequence].
        samples: number of leading samples to count; None counts all.
    """
    total = len(dataset) if samples is None else samples
    labels = (dataset[index]["labels"].numpy() for index in range(total))
    return entropy_of_counts(count_tokens(labels))
