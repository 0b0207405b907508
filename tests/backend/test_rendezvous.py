"""Ranks that are started again find each other, not those that were there before."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat

import pytest
import torch.distributed as dist

from moe_train.backend import consensus
from moe_train.backend.groups import lost_peer
from moe_train.backend.rendezvous import rendezvous
from moe_train.errors import HungError

WORLD = 3


def start(
    pool: ThreadPoolExecutor, store: dist.Store, order: list[int]
) -> list[Future[dist.Store]]:
    """One start of all ranks, which come in ``order``."""
    arrived = {rank: pool.submit(rendezvous, store, rank, WORLD, 20.0) for rank in order}
    return [arrived[rank] for rank in range(WORLD)]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_starts_do_not_mix(order: list[int]) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(WORLD) as pool:
        for number in range(3):
            results = [future.result(20) for future in start(pool, store, order)]
            assert not any(one.check(["address/1"]) for one in results), "of an earlier start"
            results[1].set("address/1", str(number))
            assert [one.get("address/1") for one in results] == [str(number).encode()] * WORLD


def test_half_a_start_leaves_nothing_behind() -> None:
    """Ranks of a start that never was complete have announced themselves."""
    store = dist.HashStore()
    store.set("announce/1", "somebody who is dead")
    with pytest.raises(HungError, match="rank 1, 2 did not join"):
        rendezvous(store, 0, WORLD, 0.2)
    with ThreadPoolExecutor(WORLD) as pool:
        results = [future.result(20) for future in start(pool, store, [0, 1, 2])]
        results[2].set("x", "y")
        assert all(one.get("x") == b"y" for one in results)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242", True),
        ("[x/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv", True),
        ("Gloo connectFullMesh failed with [x/pair.cc:144] no error", True),
        ("[enforce fail at gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes", False),
        ("gloo: allgather: invalid tensor size at index 1", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_only_a_failed_connection_is_a_lost_peer(text: str, lost: bool) -> None:
    assert (lost_peer(RuntimeError(text)) is not None) == lost


def test_a_refusal_of_nccl_is_no_lost_peer() -> None:
    assert lost_peer(dist.DistBackendError("ncclRemoteError: a peer process exited")) is not None
    assert lost_peer(dist.DistBackendError("ncclInvalidUsage: This usually reflects")) is None


def test_a_comparison_waits_for_every_rank_and_names_the_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consensus, "launcher_store", lambda *place: dist.HashStore())
    with pytest.raises(HungError, match="rank 1, 2 did not join"):
        consensus.reduce_through_store("plan", "mine", max, 0, WORLD, 0.2)
    with pytest.raises(HungError, match="rank 0 did not join"):
        consensus.reduce_through_store("plan", "mine", max, 2, WORLD, 0.2)


def test_all_ranks_have_rank_0s_result(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(consensus, "launcher_store", lambda *place: store)
    monkeypatch.setattr(consensus, "_CALLS", repeat(1))
    with ThreadPoolExecutor(WORLD) as pool:
        args = [
            pool.submit(
                consensus.reduce_through_store, "plan", str(rank), "+".join, rank, WORLD, 20.0
            )
            for rank in (2, 0, 1)
        ]
        assert {one.result(20) for one in args} == {"0+1+2"}
    assert consensus.reduce_through_store("plan", "7", "+".join, 0, 1, 20.0) == "7"
