"""A rank that dies in the middle of an exchange ends the others, who say where it happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from moe_train.errors import EXIT_HUNG
from moe_train.run_folder.status import read_status
from moe_train.testing.runs import QUIET
from moe_train.testing.world import run_world

pytestmark = pytest.mark.world

SMALL = [
    "parallel=single",
    "recompute=none",
    "parallel.placement=span",
    "parallel.pipeline=2",
    "parallel.expert=2",
    "model.layers=4",
    "model.hidden=64",
    "model.heads=8",
    "model.head_dim=8",
    "model.experts=8",
    "model.expert_hidden=32",
    "data.sequence=32",
    "checkpoint.every=0",
    "train.eval_every=0",
    "train.steps=3",
    "backend.timeout_seconds=60",
]


def dies_in_exchange(rank: int, world: int, args: list[str]) -> int:
    """Train; rank 1 is killed by itself inside the third exchange of the backward pass."""
    from moe_train.model.span.dispatcher import CrossStageDispatcher
    from moe_train.run.main import main

    backward, calls = CrossStageDispatcher.backward, [0]

    def dying(self: Any, layer: int, grad: Any = None) -> Any:
        calls[0] += 1
        if rank == 1 and calls[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(self, layer, grad)

    CrossStageDispatcher.backward = dying  # type: ignore[method-assign]
    return main(args)


def test_the_others_end_and_name_rank_tick_and_layer(tmp_path: Path) -> None:
    overrides = [*QUIET, f"run.dir={tmp_path}", "run.name=run", *SMALL]
    log = tmp_path / "ranks.log"
    alive, dead = run_world(dies_in_exchange, 2, overrides, log=log, tolerate=True)
    assert dead.failure and alive.value == EXIT_HUNG
    output = log.read_text()
    for word in ("rank 0", "all-to-all of local layer", "tick", "backward slot"):
        assert word in output, output
    assert "Traceback" not in output
    status = read_status(tmp_path / "run" / "status.json")
    assert status is not None and status.state == "failed" and "tick" in status.reason
