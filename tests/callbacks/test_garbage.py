"""Python's collector runs after chosen steps, and tensors do not wait for it."""

from __future__ import annotations

import gc
from typing import Any
from unittest import mock

import numpy as np
import pytest

from moe_train.callbacks.garbage import GarbageCollection
from moe_train.testing.world import run_world
from moe_train.train.callback import CallbackList
from tests.support import events

SMALL = ["experiment=single", "model.layers=2", "batch.global=4", "data.sequence=32"]


def steps(every: int, count: int) -> list[int]:
    collected: list[int] = []
    with CallbackList([GarbageCollection(every)]) as callbacks:
        callbacks.start(events.start())
        assert gc.isenabled() is (every == 0)
        with mock.patch.object(gc, "collect", lambda: collected.append(step)):
            for step in range(1, count + 1):
                callbacks.notify(events.step(step))
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    return collected


def test_it_collects_after_every_so_many_steps() -> None:
    assert steps(3, 10) == [3, 6, 9]
    assert steps(0, 10) == []


def test_a_run_that_fails_leaves_pythons_collector_on() -> None:
    with (
        pytest.raises(ZeroDivisionError),
        CallbackList([GarbageCollection(5)]) as callbacks,
    ):
        callbacks.start(events.start())
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()


def _left(rank: int, world: int, overrides: list[str], planted: bool = False) -> tuple[int, int]:
    """Bytes of tensors that only the collector frees after a step, and those of all parameters."""
    import torch

    from moe_train.train.step import train_step
    from tests.support.engines import micro_batches, open_engine

    engine = open_engine(rank, world, [*SMALL, *overrides], vocab=256)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 33))
    train_step(engine, micro_batches(engine, tokens), 1)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    train_step(engine, micro_batches(engine, tokens), 2)
    if planted:
        cycle: list[Any] = [torch.zeros(1_000_000)]
        cycle.append(cycle)
        del cycle
    gc.collect()
    left: dict[int, int] = {}

    def count(thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            left[storage._cdata] = storage.nbytes()

    for thing in gc.garbage:
        count(thing)
        for inner in gc.get_referents(thing):
            count(inner)
    parameters = {p.untyped_storage()._cdata for c in engine.chunks for p in c.parameters()}
    held = sum(p.nbytes for chunk in engine.chunks for p in chunk.parameters())
    return sum(size for key, size in left.items() if key not in parameters), held


@pytest.mark.world
@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        pytest.param(1, ["recompute.layers=all"], marks=pytest.mark.full),
        (1, ["recompute.modules=[moe_act,layernorm]", "dtype=bf16"]),
        (2, ["parallel.pipeline=2", "parallel.placement=span", "parallel.expert=2"]),
    ],
)
def test_tensors_do_not_wait_for_the_collector(world: int, overrides: list[str]) -> None:
    for left, held in run_world(_left, world, overrides):
        assert left < held / 100


def test_a_tensor_in_a_cycle_would_be_seen() -> None:
    [(left, _)] = run_world(_left, 1, [], True)
    assert left >= 4_000_000
