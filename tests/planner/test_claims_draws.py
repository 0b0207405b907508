"""Claims over random plans: what holds for one report has to hold for all.

Draws over hardware, ranks, layout, overlap, optimizer, recomputation and length of sequences.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import combinations

import pytest

from moe_train.errors import ConfigFaults
from moe_train.parallel.shapes import Assumptions
from moe_train.planner.claims.document import find, load
from moe_train.planner.claims.report import as_data, open_plan
from moe_train.planner.claims.verdicts import CONFIRMED, NOT_JUDGED, Verdict
from moe_train.planner.estimate import Estimate
from moe_train.planner.plan import BAND
from moe_train.planner.search import better_than
from tests.support.claims import recomputed

DIMENSIONS = {
    "hardware": ["a100_64gb", "a100_80gb", "h100_64gb", "h100_80gb", "h200_141gb", "a100_40gb"],
    "parallel.overlap_expert_comm": ["true", "false"],
    "optim": ["precision_aware", "adam"],
    "recompute": ["none", "reference", "all"],
    "data.sequence": ["512", "1024", "2048", "4096", "8192"],
    "parallel.tensor": ["1", "2", "4"],
    "parallel.pipeline": ["1", "2", "4", "8"],
    "parallel.virtual_pipeline": ["1", "1", "2"],
    "parallel.placement": ["span", "stage"],
    "parallel.expert": ["1", "2", "4", "8"],
}
WORLDS = [4, 8, 16, 32]


def draws(seed: int, count: int) -> Iterator[tuple[list[str], int, Estimate, list[Verdict]]]:
    """Legal plans of the document, judged."""
    chance, document = random.Random(seed), load(find("source_document"))
    while count:
        words = [f"{key}={chance.choice(values)}" for key, values in DIMENSIONS.items()]
        if "parallel.placement=span" in words:
            words = [word for word in words if not word.startswith("parallel.expert=")]
        world = chance.choice(WORLDS)
        try:
            plan, verdicts = open_plan(document, words, world, Assumptions())
        except ConfigFaults:
            continue
        count -= 1
        yield words, world, plan, verdicts


def exclude_each_other(one: object, other: object) -> bool:
    """Whether two values or ranges of a key have nothing in common."""
    sets = []
    for each in (one, other):
        if isinstance(each, tuple):
            sets.append(set(range(each[0], each[1] + 1)))
        else:
            sets.append({int(each)} if str(each).isdigit() else {each})  # type: ignore[call-overload]
    return not sets[0] & sets[1]


def check(words: list[str], world: int, plan: Estimate, verdicts: list[Verdict]) -> None:
    case = f"{' '.join(words)} --world {world}"
    by_id = {verdict.claim.id: verdict for verdict in verdicts}
    best = by_id["8.6"]
    if best.kind == CONFIRMED:
        assert plan.fits and better_than(plan) is None, case
    if best.kind == NOT_JUDGED and best.value is not None:
        assert 0 < best.value <= BAND, case
    schedule = by_id["2.11"]
    assert schedule.kind != CONFIRMED or schedule.value == 0, case
    if plan.layout.pipeline == 1:
        assert schedule.kind == NOT_JUDGED, case
    for one, other in combinations(verdicts, 2):
        shared = set(one.needs) & set(other.needs)
        if any(exclude_each_other(one.needs[key], other.needs[key]) for key in shared):
            assert other.claim.id in one.excludes and one.claim.id in other.excludes, case
    data = json.loads(json.dumps(as_data(load(find("source_document")), verdicts, plan)))
    recomputed(data)


def test_claims_of_a_few_random_plans() -> None:
    for words, world, plan, verdicts in draws(seed=1000, count=3):
        check(words, world, plan, verdicts)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100))
def test_claims_of_random_plans(seed: int) -> None:
    """500 in all."""
    for words, world, plan, verdicts in draws(seed, count=5):
        check(words, world, plan, verdicts)
