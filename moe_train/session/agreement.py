"""One outcome for all ranks of a collective step that some of them may have failed."""

from __future__ import annotations

import torch.distributed as dist

from moe_train.errors import MoeTrainError


def agree[T](fault: MoeTrainError | None, value: T) -> T:
    """Rank 0's ``value`` on every rank, unless a rank has a fault; collective over the world.

    Without this a rank that cannot go on would leave its peers waiting in their next
    collective until the timeout.

    Raises:
        MoeTrainError: the first fault by rank, the same on every rank.
    """
    outcomes: list[tuple[MoeTrainError | None, T] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (fault, value))
    told = [outcome for outcome in outcomes if outcome is not None]
    for other, _ in told:
        if other is not None:
            # This rank's own keeps its cause.
            raise fault if fault is not None and str(fault) == str(other) else other
    return told[0][1]
