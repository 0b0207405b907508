"""Rank 0's ears: metrics.jsonl and experts' tokens first, then console, status and mirror."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from moe_train.callbacks.progress import ConsoleProgress
from moe_train.callbacks.wandb import Mirror
from moe_train.parallel.flops import mfu
from moe_train.run_folder.folder import RunFolder
from moe_train.run_folder.metrics import MetricsLog
from moe_train.run_folder.status import write_status


class _Routing(Protocol):
    @property
    def tokens_LE(self) -> Any: ...


class Routed(Protocol):
    """What a step's routers did: tokens that each expert accepted, [layers, experts]."""

    @property
    def routing(self) -> _Routing: ...


class Recorder:
    """Listens to the loop on rank 0.

    Args:
        log: metrics.jsonl.
        tokens: experts/tokens.jsonl: a line a step, the tokens of every layer's every expert.
        flops_per_token: of the model, forward and backward.
        peak_flops: of all devices together; 0 where unknown.
        unigram_entropy: of the validation tokens, nats per token; None without validation.
    """

    def __init__(
        self,
        folder: RunFolder,
        log: MetricsLog,
        tokens: MetricsLog,
        progress: ConsoleProgress,
        mirror: Mirror,
        *,
        flops_per_token: float,
        peak_flops: float,
        unigram_entropy: float | None,
    ) -> None:
        self.folder, self.progress, self.mirror = folder, progress, mirror
        self._log, self._tokens = log, tokens
        self._flops, self._peak, self._entropy = flops_per_token, peak_flops, unigram_entropy

    def on_step(self, record: dict[str, Any], result: Routed) -> None:
        """Write one training line, and what each expert had."""
        record["mfu"] = mfu(record["tokens_per_second"], self._flops, self._peak)
        self._log.append(record)
        counts = result.routing.tokens_LE.long().tolist()
        self._tokens.append({"step": record["step"], "tokens": counts})
        write_status(self.folder.status, "running", record["step"])
        self.mirror.log(record)
        self.progress.step(record)

    def on_validation(self, record: dict[str, Any]) -> None:
        """Write one validation line."""
        if self._entropy is not None:
            record["unigram_entropy"] = self._entropy
        self._log.append(record)
        self.mirror.log(record)
        self.progress.validation(record)

    def truncate_after(self, step: int) -> None:
        """Forget the steps after `step`: they are going to be trained again."""
        self._log.truncate_after(step)
        self._tokens.truncate_after(step)


class Silent:
    """The other ranks' listener."""

    def on_step(self, record: Mapping[str, Any], result: object) -> None:
        """Nothing to do."""

    def on_validation(self, record: Mapping[str, Any]) -> None:
        """Nothing to do."""
