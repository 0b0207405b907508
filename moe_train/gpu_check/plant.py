"""The training program with an injected fault.

``python -m moe_train.gpu_check.plant KIND STEP RANK [overrides]``.

KIND is ``kill`` (the rank kills itself with SIGKILL) or ``memory`` (its device has no memory
left); it happens at the beginning of step STEP. Overrides follow.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from moe_train.run.main import main as train


def main(argv: Sequence[str]) -> int:
    """Train with the fault; returns the exit code."""
    kind, step, rank, *overrides = argv
    assert kind in ("kill", "memory"), kind
    if int(os.environ.get("RANK", "0")) == int(rank):
        _install(kind, int(step))
    return train(overrides)


def _install(kind: str, at: int) -> None:
    # The loop is imported only after the backend has prepared for Megatron, so the way in is a
    # function of ours that it calls later.
    from moe_train.data import batches

    plain, begun = batches.BatchSource.next_step, [0]

    def next_step(source: batches.BatchSource) -> Any:
        begun[0] += 1
        if begun[0] == at:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            import torch

            raise torch.OutOfMemoryError("planted: tried to allocate 1.00 GiB")
        return plain(source)

    setattr(batches.BatchSource, "next_step", next_step)  # noqa: B010 - a method for mypy


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
