"""What to generate and how tokens are chosen; no torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from moe_train.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: greedily, or drawn from the filtered distribution."""

    greedy: bool = False
    """Take the most likely token; the fields below are then unused."""
    temperature: float = 1.0
    """The logits are divided by it."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    top_p: float | None = None
    """Keep the fewest most likely tokens that have this probability together
    (nucleus sampling, arXiv:1904.09751), after `temperature` and `top_k`."""
    seed: int = 1234
    """Of the draws: token n of prompt i depends on (seed, i, n) and the logits alone."""

    def faults(self) -> Iterator[ConfigError]:
        """Values without a meaning."""
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            yield ConfigError(
                "temperature", f"{self.temperature} is not above 0", "greedy is the limit at 0"
            )
        if self.top_k is not None and self.top_k < 1:
            yield ConfigError("top_k", f"{self.top_k} keeps no token", "1 or more, or none")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield ConfigError("top_p", f"{self.top_p} is no probability", "above 0, at most 1")

    def draw(self, prompt: int, position: int) -> float:
        """A number in [0, 1), the same in every layout and batch."""
        name = f"{self.seed}/{prompt}/{position}".encode()
        return int.from_bytes(hashlib.sha256(name).digest()[:6], "big") / 2**48


@dataclass(frozen=True)
class Request:
    """What to generate."""

    tokens: int = 100
    """Most new tokens of a prompt."""
    sampling: Sampling = Sampling()
    eod: int | None = None
    """The token that ends a completion; None goes on to the last one."""
    cache: bool = True
    """Keep keys and values instead of computing every sequence again for each token."""
    batch: int = 8
    """Prompts of a replica that are computed together."""
