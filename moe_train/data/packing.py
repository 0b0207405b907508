"""Megatron's GPT dataset with an order that does not depend on how long a run is.

Megatron shuffles all epochs that a run needs together, so that a run of 10 steps and one of
20 steps can see different samples from the first step on. A run that is stopped early and
continued, or extended, would then repeat and miss data. Here the first epoch is Megatron's
own; each later one is a permutation of the same samples, seeded by its number.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDataset


class EndlessGPTDataset(GPTDataset):  # type: ignore[misc]
    """Equal-length packed samples without end; sample i is the same for every run length."""

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
        found: dict[str, Any] = super().__getitem__(index)
        return found

    def _permute(self, epoch: int) -> npt.NDArray[np.int64]:
        seed = [self.config.random_seed, epoch]
        return np.random.default_rng(seed).permutation(self.epoch_samples)
