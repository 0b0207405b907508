"""Which sample goes to which replica and micro-batch: an order that no layout changes.

Global batch k is samples [k*G, (k+1)*G) of the dataset. Micro-batch m of data rank d takes
the `micro` samples that start at k*G + (m*D + d)*micro, so all ranks together, for any
number D of them, see every sample of the batch once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_train.errors import ConfigError, DataError

KEYS = ("tokens", "labels", "loss_mask", "position_ids")

MicroBatch = dict[str, torch.Tensor]
"""`KEYS`, each of shape [micro, sequence], on the CPU."""


class BatchSource:
    """Micro-batches of one data rank; its whole state is `consumed`.

    Args:
        dataset: items with `KEYS`, each of shape [sequence].
        global_batch: samples per step over all data ranks.
        micro: samples per micro-batch.
        data_rank: this rank among `data_size` replicas.
        data_size: data-parallel replicas.
        consumed: samples that all replicas took before, in this run or the one it continues.
        limit: ids that the model has; None takes any.

    Raises:
        ConfigError: the global batch is no multiple of micro x data_size.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        global_batch: int,
        micro: int,
        data_rank: int,
        data_size: int,
        consumed: int = 0,
        limit: int | None = None,
    ) -> None:
        assert 0 <= data_rank < data_size and micro > 0 and consumed >= 0
        if global_batch < 1 or global_batch % (micro * data_size):
            unit = micro * data_size
            near = max(unit, round(global_batch / unit) * unit)
            raise ConfigError(
                "batch.global",
                f"{global_batch} is no multiple of micro {micro} x {data_size} replicas",
                f"nearest: {near}",
            )
        self.dataset, self.global_batch, self.micro = dataset, global_batch, micro
        self.data_rank, self.data_size = data_rank, data_size
        self.consumed, self._limit = consumed, limit

    @property
    def microbatches(self) -> int:
        """Micro-batches per step on every data rank."""
        return self.global_batch // (self.micro * self.data_size)

    def indices(self) -> list[list[int]]:
        """Dataset indices of the next step here, shape [microbatches][micro]."""
        starts = (
            self.consumed + (m * self.data_size + self.data_rank) * self.micro
            for m in range(self.microbatches)
        )
        return [list(range(start, start + self.micro)) for start in starts]

    def next_step(self) -> list[MicroBatch]:
        """Micro-batches of the next step; moves on by one global batch.

        Raises:
            DataError: a sample holds an id beyond `limit`. Files are looked through when they are
                opened; this meets those that are too large for it, and those changed since.
        """
        step = [self._collate(indices) for indices in self.indices()]
        self.consumed += self.global_batch
        return step

    def _collate(self, indices: list[int]) -> MicroBatch:
        samples = [self.dataset[index] for index in indices]
        if self._limit is not None:
            for index, sample in zip(indices, samples, strict=True):
                largest = max(int(sample[key].max()) for key in ("tokens", "labels"))
                if largest >= self._limit:
                    raise DataError(
                        f"sample {index}",
                        f"token id {largest} is beyond the model's vocabulary of {self._limit}",
                        "moe-train data inspect PREFIX --verify names file and offset",
                    )
        return {key: torch.stack([sample[key] for sample in samples]) for key in KEYS}
