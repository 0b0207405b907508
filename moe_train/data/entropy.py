"""Unigram entropy: the loss of a model that knows only how often each token occurs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


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
        found = np.bincount(chunk.reshape(-1), minlength=counts.size)
        found[: counts.size] += counts
        counts = found
    return counts


def unigram_entropy(tokens: npt.NDArray[Any]) -> float:
    """Entropy in nats per token of an array of ids of any shape."""
    return entropy_of_counts(count_tokens([tokens]))


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
