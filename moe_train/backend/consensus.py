"""One answer for all ranks, through the launcher's store, before any process group exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count

import torch.distributed as dist

from moe_train.backend.groups import launcher_store
from moe_train.backend.rendezvous import missing

_QUESTIONS = count(1)


def settle(
    name: str,
    mine: str,
    answer: Callable[[Sequence[str]], str],
    rank: int,
    world: int,
    seconds: float,
) -> str:
    """Rank 0's `answer` to the values of all ranks, on every rank; call on every rank.

    Args:
        name: what is settled, for the store's keys and messages.
        mine: this rank's value.
        answer: called on rank 0 with every rank's value, in rank order.
        seconds: to wait for the slowest rank.

    Raises:
        HungError: a rank did not come in time.
    """
    if world == 1:
        return answer([mine])
    # A process that runs several jobs of a sweep settles each by itself.
    store = dist.PrefixStore(f"{name}{next(_QUESTIONS)}", launcher_store(rank, world, int(seconds)))
    store.set(f"from/{rank}", mine)
    if rank == 0:
        _wait(store, [f"from/{other}" for other in range(world)], seconds)
        result = answer([store.get(f"from/{other}").decode() for other in range(world)])
        store.set("answer", result)
        # Rank 0 may hold the store, and may end as soon as this returns.
        _wait(store, [f"seen/{other}" for other in range(1, world)], seconds)
        return result
    _wait(store, ["answer"], seconds)
    result = store.get("answer").decode()
    store.set(f"seen/{rank}", "")
    return result


def _wait(store: dist.Store, keys: list[str], seconds: float) -> None:
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistStoreError as error:
        late = [key for key in keys if not store.check([key])]
        ranks = [int(number) for key in late if (number := key.rpartition("/")[2]).isdecimal()]
        raise missing(ranks or [0], seconds) from error
