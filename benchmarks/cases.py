"""What is timed: one optimizer step of the twin's model, cut into micro-batches in some way."""

from __future__ import annotations

from dataclasses import dataclass

VOCAB = 2048
TOKENS = 1024
"""Per step, in every case."""


@dataclass(frozen=True)
class Case:
    """One process, one thread."""

    name: str
    micro: int
    """Sequences of a micro-batch."""

    @property
    def overrides(self) -> list[str]:
        """Overrides of ours."""
        return [
            *("device=cpu", "experiment=twin", "parallel=single", "recompute=none", "dtype=fp32"),
            *("train.eval_every=0", f"model.vocab={VOCAB}", f"batch.micro={self.micro}"),
            *(f"batch.global={TOKENS // 128}", "data.sequence=128"),
        ]


CASES = {case.name: case for case in (Case("s1_fp32_1thread", 1), Case("s8_fp32_1thread", 8))}
