"""Ranks of one start find each other in a store that an earlier start may have used.

torchrun keeps its store when it starts ranks again, and gloo writes each rank's address under the
rank's number: a rank that is quick would take the address of one that is dead.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from moe_train.errors import HungError

POLL = 0.02
"""Seconds between two looks at the store."""


def meet(store: dist.Store, rank: int, world: int, timeout_seconds: float) -> dist.Store:
    """A part of ``store`` that only this start's ranks know; call on every rank.

    Every rank says hello with a number of its own; rank 0 answers each number that it finds, be
    it from now or from before, until all ranks have taken up its answer.

    Raises:
        HungError: a rank did not come in time.
    """
    if rank == 0:
        return dist.PrefixStore(_gather(store, world, timeout_seconds), store)
    mine = uuid.uuid4().hex
    store.set(f"hello/{rank}", mine)
    try:
        store.wait([f"welcome/{mine}"], timedelta(seconds=timeout_seconds))
    except dist.DistStoreError as error:
        raise missing([0], timeout_seconds) from error
    token = store.get(f"welcome/{mine}").decode()
    store.set(f"{token}/{rank}", "here")
    return dist.PrefixStore(token, store)


def _gather(store: dist.Store, world: int, timeout_seconds: float) -> str:
    token, until = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    waiting, answered = set(range(1, world)), set()
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"hello/{rank}"]):
                theirs = store.get(f"hello/{rank}").decode()
                if theirs not in answered:
                    store.set(f"welcome/{theirs}", token)
                    answered.add(theirs)
            if store.check([f"{token}/{rank}"]):
                waiting.discard(rank)
        if time.monotonic() > until:
            raise missing(sorted(waiting), timeout_seconds)
        time.sleep(POLL)
    return token


def missing(ranks: list[int], seconds: float) -> HungError:
    """The error of ranks that did not come."""
    named = ", ".join(map(str, ranks))
    return HungError(
        "world",
        f"rank {named} did not come within {seconds:.0f} s",
        "look at that rank's own output; all ranks have to be started together",
    )
