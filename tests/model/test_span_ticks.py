"""The tick-aligned schedule: slots, order and memory, for any stages and micro-batches."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.features.schedules import SCHEDULES, Pipeline, ticks

STAGES = st.integers(1, 12)
BATCHES = st.integers(1, 40)


@given(STAGES, BATCHES)
def test_as_many_slots_as_1f1b(stages: int, microbatches: int) -> None:
    slots = list(ticks(stages, microbatches))
    assert sum(bool(tick.forward) for tick in slots) == microbatches + stages - 1
    assert sum(bool(tick.backward) for tick in slots) == microbatches + stages - 1
    only_forward = list(ticks(stages, microbatches, forward_only=True))
    assert len(only_forward) == microbatches + stages - 1
    assert not any(tick.backward for tick in only_forward)


@given(STAGES, BATCHES)
def test_every_stage_does_every_microbatch_once_in_order(stages: int, microbatches: int) -> None:
    for stage in range(stages):
        forward = [t.forward[stage] for t in ticks(stages, microbatches) if stage in t.forward]
        backward = [t.backward[stage] for t in ticks(stages, microbatches) if stage in t.backward]
        assert forward == backward == list(range(microbatches))


@given(STAGES, BATCHES)
def test_messages_arrive_one_tick_before_they_are_used(stages: int, microbatches: int) -> None:
    """What a stage computes at tick t its neighbour uses at t + 1, forward and backward."""
    forward: dict[tuple[int, int], int] = {}
    backward: dict[tuple[int, int], int] = {}
    for tick in ticks(stages, microbatches):
        forward.update(dict.fromkeys(tick.forward.items(), tick.number))
        backward.update(dict.fromkeys(tick.backward.items(), tick.number))
    for (stage, batch), number in forward.items():
        if stage:
            assert number == forward[stage - 1, batch] + 1
    for (stage, batch), number in backward.items():
        if stage < stages - 1:
            assert number == backward[stage + 1, batch] + 1
        else:
            assert number == forward[stage, batch]


@settings(max_examples=60)
@given(STAGES, BATCHES)
def test_micro_batches_held(stages: int, microbatches: int) -> None:
    held: Counter[int] = Counter()
    most: Counter[int] = Counter()
    for tick in ticks(stages, microbatches):
        held.update(tick.forward.keys())
        for stage in range(stages):
            most[stage] = max(most[stage], held[stage])
        held.subtract(tick.backward.keys())
    assert [most[s] for s in range(stages)] == [
        SCHEDULES["span"].in_flight(Pipeline(stages, microbatches), s) for s in range(stages)
    ]
