"""Training and validation datasets through Megatron's packing and blending."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from moe_train.config.training import DataConfig
from moe_train.data.cache import (
    cache_folder,
    indices_unchanged,
    lock,
    record_indices,
    refuse_pickles,
)
from moe_train.data.corpus import Corpus, Part, open_corpus
from moe_train.errors import DataError
from moe_train.files import json_digest

SURPLUS = 0.5
"""Samples that a blend may take of a part beyond its share; free, since parts are endless."""


class Datasets(NamedTuple):
    """Datasets of packed samples; None where no sample was requested.

    An item has ``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (float32),
    each of shape [sequence].
    """

    train: Any
    valid: Any


class EndlessGPTDataset(GPTDataset):  # type: ignore[misc]
    """Megatron's packed samples without end; sample i is the same for every run length.

    Megatron shuffles all epochs that a run needs together, so that a run of 10 steps and one of
    20 steps can see different samples from the first step on. A run that is stopped early and
    continued, or extended, would then repeat and miss data. Here the first epoch is Megatron's
    own; each later one is a permutation of the same samples, seeded by its number.
    """

    def __init__(
        self, dataset: Any, path: Any, indices: Any, samples: int | None, split: Any, config: Any
    ) -> None:
        # None: Megatron builds, and names in its cache, one epoch whatever the run needs.
        super().__init__(dataset, path, indices, None, split, config)
        self.num_samples = samples
        self._permutation = lru_cache(maxsize=2)(self._permute)

    @property
    def epoch_samples(self) -> int:
        """Distinct samples: one pass over the data."""
        return int(super().__len__())

    def __len__(self) -> int:
        return max(self.epoch_samples, self.num_samples or 0)

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        if index is not None:
            epoch, index = divmod(int(index), self.epoch_samples)
            if epoch:
                index = int(self._permutation(epoch)[index])
        sample: dict[str, Any] = super().__getitem__(index)
        return sample

    def _permute(self, epoch: int) -> npt.NDArray[np.int64]:
        seed = [self.config.random_seed, epoch]
        return np.random.default_rng(seed).permutation(self.epoch_samples)


class _MegatronTokenizer:
    """The members that Megatron's datasets read; the ids themselves are prepared already."""

    def __init__(self, corpus: Corpus) -> None:
        self.vocab_size = corpus.vocab_size
        self.eod = corpus.eod
        name = corpus.tokenizer.fingerprint if corpus.tokenizer else "unknown"
        self.unique_identifiers = {"fingerprint": name}


def build_datasets(
    config: DataConfig,
    *,
    sequence: int,
    seed: int,
    train_samples: int,
    valid_samples: int = 0,
    vocab_limit: int | None = None,
    corpus: Corpus | None = None,
) -> Datasets:
    """Build the datasets of a run: samples packed and blended by Megatron.

    Every token counts in the loss and attends to its whole sample: ends of documents are neither
    masked (``eod_mask_loss``) nor borders of attention (``reset_attention_mask``).

    Without a process group every process builds or loads alone (a file lock keeps them
    apart, and the cache may be local to a node); with one, all ranks must call this
    together, and must share the cache folder.

    Args:
        config: the data section.
        sequence: tokens per sample.
        seed: seed of the order.
        train_samples: samples that training takes; the order does not depend on it.
        valid_samples: samples per validation; 0 builds none.
        vocab_limit: ids that the model has; None skips this check.
        corpus: what `open_corpus(config)` gave, if it was called before.

    Raises:
        DataError: unusable data, or a split too short for one sample.
    """
    corpus = corpus or open_corpus(config)
    if vocab_limit is not None:
        corpus.check_vocabulary(vocab_limit)
    sizes = [train_samples, valid_samples, 0]
    folder = _index_folder(config, corpus)
    settings: dict[str, Any] = {
        "random_seed": seed,
        "sequence_length": sequence,
        "path_to_cache": str(folder),
        "tokenizer": _MegatronTokenizer(corpus),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
        "mid_level_dataset_surplus": SURPLUS,
    }
    if corpus.valid:
        _check_length(corpus.train, (0.0, 1.0), sequence, "train")
        _check_length(corpus.valid, (0.0, 1.0), sequence, "valid")
        per_split = [
            _blend(p) if n else None
            for p, n in ((corpus.train, train_samples), (corpus.valid, valid_samples))
        ]
        if not any(per_split):
            return Datasets(None, None)
        built = GPTDatasetConfig(blend_per_split=[*per_split, None], **settings)
    else:
        built = GPTDatasetConfig(blend=_blend(corpus.train), split=config.split, **settings)
        for index, size in enumerate(sizes):
            if size:
                bounds = built.split_matrix[index] or (0.0, 0.0)
                _check_length(corpus.train, bounds, sequence, ("train", "valid")[index])
            else:
                built.split_matrix[index] = None
    with _building(folder):
        builder = BlendedMegatronDatasetBuilder(EndlessGPTDataset, sizes, lambda: True, built)
        return Datasets(*builder.build()[:2])


def _blend(parts: Sequence[Part]) -> tuple[list[str], list[float] | None]:
    """Megatron's form of a blend; parts without weights count by their tokens."""
    prefixes = [str(part.prefix.resolve()) for part in parts]
    if len(parts) == 1:
        return prefixes, None
    weights = [float(part.files.tokens) if part.weight is None else part.weight for part in parts]
    return prefixes, weights


def _check_length(
    parts: Sequence[Part], bounds: tuple[float, float], sequence: int, name: str
) -> None:
    """Refuse a split that does not hold one sample (and the token after it)."""
    for part in parts:
        lengths = part.files.lengths
        begin, end = (int(round(bound * float(lengths.size))) for bound in bounds)
        tokens = int(lengths[begin:end].sum(dtype=np.int64))
        if tokens < sequence + 1:
            raise DataError(
                str(part.prefix),
                f"its {name} split has {end - begin} of {lengths.size} documents and {tokens} "
                f"tokens, too short for one sample of {sequence} + 1",
                "more data, a shorter data.sequence, another data.split"
                + (", or data.valid with its own data" if name == "valid" else ""),
            )


def _index_folder(config: DataConfig, corpus: Corpus) -> Path:
    """Cache folder bound to the state of the files: Megatron's own key is their path only."""
    state = []
    for part in (*corpus.train, *corpus.valid):
        stat = part.files.bin_path.stat()
        manifest = part.files.manifest
        digest = manifest.idx_sha256 if manifest else stat.st_mtime_ns
        state.append([str(part.prefix.resolve()), stat.st_size, digest])
    return cache_folder(config.cache) / "indices" / json_digest(state)[:20]


@contextmanager
def _building(folder: Path) -> Iterator[None]:
    """Hold the folder's lock while indices are built in it; first delete damaged or partial ones.

    With a process group Megatron writes on rank 0 alone and has the others wait for it.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        yield
        return
    with lock(folder):
        unfinished = folder.with_name(folder.name + ".building")
        refuse_pickles(folder)
        if unfinished.exists() or not indices_unchanged(folder):
            shutil.rmtree(folder, ignore_errors=True)
        unfinished.touch()
        yield
        if folder.is_dir():
            record_indices(folder)
        unfinished.unlink()
