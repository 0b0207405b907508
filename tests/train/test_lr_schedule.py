"""Learning-rate schedules against their closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from moe_train.config.training import OptimConfig
from moe_train.testing.world import run_world

LR, MIN, WARM, DECAY, TAIL = 2e-3, 2e-4, 10, 100, 25


def warm(step: int) -> float:
    return LR * step / WARM


def progress(step: int) -> float:
    return min(1.0, (step - WARM) / (DECAY - WARM))


def cosine(step: int) -> float:
    return MIN + (LR - MIN) * (1 + math.cos(math.pi * progress(step))) / 2


def linear(step: int) -> float:
    return MIN + (LR - MIN) * (1 - progress(step))


def wsd(step: int) -> float:
    """Flat, then a straight line over the last TAIL steps of the decay."""
    left = max(0.0, min(1.0, (DECAY - step) / TAIL))
    return MIN + (LR - MIN) * left


def constant(step: int) -> float:
    return LR


FORMS: dict[str, Callable[[int], float]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "constant": constant,
}


class Groups:
    """An optimizer as a scheduler sees it: two groups, one with a rate of its own."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [
            {"max_lr": LR, "min_lr": MIN, "wd_mult": 1.0},
            {"max_lr": LR, "min_lr": MIN, "wd_mult": 0.0},
        ]


def _rates(rank: int, world: int, optim: OptimConfig, steps: list[int], total: int) -> Any:
    from moe_train.train.lr_schedule import build_scheduler, set_step

    groups = Groups()
    scheduler = build_scheduler(groups, optim, total)
    results = []
    for step in steps:
        rate = set_step(scheduler, step)
        assert all(group["lr"] == rate for group in groups.param_groups)
        decays = [group["weight_decay"] for group in groups.param_groups]
        assert decays == [optim.weight_decay, 0.0]
        results.append(rate)
    return results


def rates(steps: list[int], total: int = DECAY, **fields: Any) -> list[float]:
    optim = OptimConfig(**{"lr": LR, "min_lr": MIN, "warmup_steps": WARM, **fields})
    answer: list[float] = run_world(_rates, 1, optim, steps, total)[0]
    return answer


STEPS = [1, 2, 9, 10, 11, 37, 55, 74, 75, 76, 80, 99, 100, 101, 500]


@pytest.mark.parametrize("schedule", FORMS)
def test_closed_form(schedule: str) -> None:
    result = rates(STEPS, schedule=schedule, decay_steps=DECAY, wsd_decay_steps=TAIL, total=7)
    wanted = [warm(step) if step <= WARM else FORMS[schedule](step) for step in STEPS]
    assert result == pytest.approx(wanted, rel=1e-9)
    assert result[3] == pytest.approx(LR)


def test_the_decay_lasts_as_long_as_the_run_by_default() -> None:
    assert rates(STEPS, schedule="linear") == rates(STEPS, schedule="linear", decay_steps=DECAY)
    default_tail = rates(STEPS, schedule="wsd")
    assert default_tail == rates(STEPS, schedule="wsd", wsd_decay_steps=DECAY // 10)


def test_a_step_has_its_rate_whatever_came_before() -> None:
    forward = rates(STEPS, schedule="cosine")
    backward = rates(STEPS[::-1], schedule="cosine")
    assert forward == backward[::-1]


def test_without_warm_up_the_first_step_decays_at_once() -> None:
    first, last = rates([1, DECAY], schedule="linear", warmup_steps=0)
    assert first == pytest.approx(MIN + (LR - MIN) * (1 - 1 / DECAY))
    assert last == pytest.approx(MIN)


def test_warm_up_longer_than_the_run() -> None:
    assert rates([1, 5], total=5, schedule="cosine") == pytest.approx([warm(1), warm(5)])
