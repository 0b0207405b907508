"""Compare a value of all ranks through the launcher's store, before process groups exist."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist

from moe_train.backend.groups import launcher_store
from moe_train.backend.rendezvous import missing

_CALLS = count(1)


def reduce_through_store(
    name: str,
    value: Any,
    reduce: Callable[[list[Any]], Any],
    rank: int,
    world: int,
    seconds: float,
) -> Any:
    """`reduce` of all ranks' values, computed on rank 0, on every rank; call on every rank.

    Values and the result travel as JSON.

    Args:
        name: what is compared, for the store's keys.
        reduce: called on rank 0 with every rank's value, in rank order.
        seconds: to wait for the slowest rank.

    Raises:
        HungError: a rank did not join in time.
    """
    if world == 1:
        return reduce([value])
    # Each job of a sweep calls this again in the same process.
    store = dist.PrefixStore(f"{name}{next(_CALLS)}", launcher_store(rank, world, int(seconds)))
    store.set(f"from/{rank}", json.dumps(value))
    if rank == 0:
        _wait(store, [f"from/{other}" for other in range(world)], seconds)
        result = reduce([json.loads(store.get(f"from/{other}")) for other in range(world)])
        store.set("result", json.dumps(result))
        # Rank 0 may hold the store, and may end as soon as this returns.
        _wait(store, [f"seen/{other}" for other in range(1, world)], seconds)
        return result
    _wait(store, ["result"], seconds)
    result = json.loads(store.get("result"))
    store.set(f"seen/{rank}", "")
    return result


def _wait(store: dist.Store, keys: list[str], seconds: float) -> None:
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistStoreError as error:
        late = [key for key in keys if not store.check([key])]
        ranks = [int(number) for key in late if (number := key.rpartition("/")[2]).isdecimal()]
        raise missing(ranks or [0], seconds) from error
