"""Rank 0's ears: metrics.jsonl first, then console, status and mirror."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.monitor.metrics import MetricsLog
from moe_train.monitor.mirror import Mirror
from moe_train.monitor.progress import ConsoleProgress
from moe_train.monitor.run_folder import RunFolder
from moe_train.monitor.status import write_status
from moe_train.plan.quantities.flops import mfu


class Recorder:
    """Listens to the loop on rank 0.

    Args:
        flops_per_token: of the model, forward and backward.
        peak_flops: of all devices together; 0 where unknown.
        unigram_entropy: of the validation tokens, nats per token; None without validation.
    """

    def __init__(
        self,
        folder: RunFolder,
        log: MetricsLog,
        progress: ConsoleProgress,
        mirror: Mirror,
        *,
        flops_per_token: float,
        peak_flops: float,
        unigram_entropy: float | None,
    ) -> None:
        self.folder, self.log, self.progress, self.mirror = folder, log, progress, mirror
        self._flops, self._peak, self._entropy = flops_per_token, peak_flops, unigram_entropy

    def on_step(self, record: dict[str, Any], result: object) -> None:
        """Write one training line."""
        record["mfu"] = mfu(record["tokens_per_second"], self._flops, self._peak)
        self.log.append(record)
        write_status(self.folder.status, "running", record["step"])
        self.mirror.log(record)
        self.progress.step(record)

    def on_validation(self, record: dict[str, Any]) -> None:
        """Write one validation line."""
        if self._entropy is not None:
            record["unigram_entropy"] = self._entropy
        self.log.append(record)
        self.mirror.log(record)
        self.progress.validation(record)


class Silent:
    """The other ranks' listener."""

    def on_step(self, record: Mapping[str, Any], result: object) -> None:
        """Nothing to do."""

    def on_validation(self, record: Mapping[str, Any]) -> None:
        """Nothing to do."""
