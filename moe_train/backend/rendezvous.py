"""Rendezvous of the ranks of one start in torchrun's store, which outlives restarts.

gloo stores each rank's address under the rank's number: after a restart, a rank could read the
address that a dead process left there.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from moe_train.errors import HungError

POLL = 0.02
"""Seconds between two polls of the store."""


def rendezvous(store: dist.Store, rank: int, world: int, timeout_seconds: float) -> dist.Store:
    """A prefix of ``store`` that only this start's ranks use; call on every rank.

    Every rank announces a random id; rank 0 assigns its prefix to each id that it finds, of this
    start or an earlier one, until all ranks have acknowledged it.

    Raises:
        HungError: a rank did not join in time.
    """
    if rank == 0:
        return dist.PrefixStore(_assign(store, world, timeout_seconds), store)
    mine = uuid.uuid4().hex
    store.set(f"announce/{rank}", mine)
    try:
        store.wait([f"assign/{mine}"], timedelta(seconds=timeout_seconds))
    except dist.DistStoreError as error:
        raise missing([0], timeout_seconds) from error
    token = store.get(f"assign/{mine}").decode()
    store.set(f"{token}/{rank}", "joined")
    return dist.PrefixStore(token, store)


def _assign(store: dist.Store, world: int, timeout_seconds: float) -> str:
    token, until = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    waiting, assigned = set(range(1, world)), set()
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"announce/{rank}"]):
                peer = store.get(f"announce/{rank}").decode()
                if peer not in assigned:
                    store.set(f"assign/{peer}", token)
                    assigned.add(peer)
            if store.check([f"{token}/{rank}"]):
                waiting.discard(rank)
        if time.monotonic() > until:
            raise missing(sorted(waiting), timeout_seconds)
        time.sleep(POLL)
    return token


def missing(ranks: list[int], seconds: float) -> HungError:
    """The error for ranks that did not join."""
    named = ", ".join(map(str, ranks))
    return HungError(
        "world",
        f"rank {named} did not join within {seconds:.0f} s",
        "look at that rank's own output; start all ranks together",
    )
