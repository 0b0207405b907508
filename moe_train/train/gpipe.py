"""GPipe: all micro-batches forward, then all backward.

Megatron's 1F1B runs as many micro-batches ahead as there are stages after its own; a communicator
that names more makes it run all of them ahead, and nothing is left for its steady state.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_without_interleaving,
)


class _AllAhead(P2PCommunicator):  # type: ignore[misc]
    """Counts as many stages after this one as there are micro-batches."""

    microbatches: int

    @property
    def total_stages(self) -> int:
        """Stages as the schedule shall count them; messages go to the real neighbours."""
        return int(self.current_stage) + 1 + self.microbatches


class GPipeSchedule:
    """Callable with the signature of Megatron's schedules.

    Args:
        groups: Megatron's process groups.
    """

    def __init__(self, dispatcher: None, groups: Any, region: Any) -> None:
        self.groups = groups

    def __call__(
        self, *, model: list[torch.nn.Module], num_microbatches: int, **arguments: Any
    ) -> list[Any]:
        """Run every micro-batch forward (and backward); returns the losses on the last stage."""
        stages = _AllAhead(self.groups.pp, model[0].config)
        stages.microbatches = num_microbatches
        losses: list[Any] = forward_backward_pipelining_without_interleaving(
            model=model,
            num_microbatches=num_microbatches,
            p2p_communicator=stages,
            pg_collection=self.groups,
            **arguments,
        )
        return losses
