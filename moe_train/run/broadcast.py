"""Broadcast rank 0's value, or raise the same error on all ranks; compare kernel sets."""

from __future__ import annotations

import torch.distributed as dist

from moe_train.config.kernels import KernelChoice
from moe_train.errors import ConfigError, MoeTrainError


def broadcast_or_raise[T](fault: MoeTrainError | None, value: T) -> T:
    """Rank 0's ``value`` on every rank, unless a rank has a fault; collective over the world.

    Without it, peers of a faulty rank would wait in their next collective until the timeout.

    Raises:
        MoeTrainError: the first fault by rank, the same on every rank.
    """
    outcomes: list[tuple[MoeTrainError | None, T] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (fault, value))
    received = [outcome for outcome in outcomes if outcome is not None]
    for other, _ in received:
        if other is not None:
            # This rank's own error keeps its cause.
            raise fault if fault is not None and str(fault) == str(other) else other
    return received[0][1]


def check_same_kernels(choice: KernelChoice) -> None:
    """Refuse a world whose ranks chose different kernel sets; collective over the world.

    Raises:
        ConfigError: TransformerEngine imports on some nodes only; the same on every rank.
    """
    sets: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(sets, (choice.kernels.name, choice.why))
    other = next((rank for rank, (name, _) in enumerate(sets) if name != sets[0][0]), None)
    if other is not None:
        raise ConfigError(
            "backend.kernels",
            f"rank 0 uses {sets[0][0]} ({sets[0][1]}), rank {other} {sets[other][0]} "
            f"({sets[other][1]})",
            "backend.kernels=torch, or the same TransformerEngine on every node",
        )
