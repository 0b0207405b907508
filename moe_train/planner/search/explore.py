"""Branch and bound over the space: the same first choice as trying everything, in a fraction.

A cell is a layout with a micro-batch size. Cells are opened from the least bound (`bounds`) on,
until the next one is beyond what is still of use; inside a cell, an exchange that is too slow
without recomputation is dropped before any policy is tried.

Taken from the cost model as it is: recomputation never saves time; a reduction or gather that
overlaps is never slower than one that does not and needs no memory; recomputing all layers keeps
least. `tests/planner/test_search.py` holds the result against trying everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heappop, heappush, nsmallest
from itertools import product
from math import inf

from moe_train.parallel.layout import Layout
from moe_train.parallel.optimizer_state import state_bytes
from moe_train.parallel.resolved import vocabulary
from moe_train.parallel.shapes import Assumptions
from moe_train.parallel.sizes import with_layout
from moe_train.planner.cost.timing import step_time
from moe_train.planner.memory.stages import GB
from moe_train.planner.plan import Plan, assumptions_of
from moe_train.planner.search.bounds import Bounds
from moe_train.planner.search.candidate import COMFORT, Candidate, bytes_needed
from moe_train.planner.search.space import Options, Space

REACH = 2.0
"""Candidates that take more than this many times the fastest one's step are left out."""
LISTED = 2500
"""Cells and step times after which no more is computed for the frontier alone: in large worlds it
is that of the most promising cells."""


@dataclass(frozen=True)
class Cell:
    """A layout with a micro-batch size."""

    layout: Layout
    micro: int
    bound: float
    """Seconds below which no option brings a step."""


class Results:
    """What a search keeps: the best candidate of every layout, and the frontier.

    Layouts that differ in context parallelism alone count as one: fewer sequences of more ranks
    are mostly the same step.

    Args:
        wanted: layouts that are asked for.
        device: bytes of a device.
    """

    def __init__(self, wanted: int, device: float) -> None:
        self.wanted, self.device = wanted, device
        self.best: dict[Layout, Candidate] = {}
        self.frontier: list[Candidate] = []
        self._ahead: dict[tuple[int, ...], list[tuple[float, ...]]] = {}

    def add(self, one: Candidate) -> None:
        """Keep `one` where it is of use."""
        kind = replace(one.layout, context=1)
        known = self.best.get(kind)
        if known is None or one.rank < known.rank:
            self.best[kind] = one
            self._ahead.clear()
        if one.fits and not self.dominated(one.seconds, one.bytes):
            keep = [o for o in self.frontier if o.seconds < one.seconds or o.bytes < one.bytes]
            self.frontier = [*keep, one]

    def dominated(self, seconds: float, size: float) -> bool:
        """Whether a known candidate is as fast and as small."""
        return any(one.seconds <= seconds and one.bytes <= size for one in self.frontier)

    def limit(self, size: float) -> float:
        """Most seconds with which a candidate of `size` bytes is among the wanted ones."""
        if size > self.device:
            return -inf
        tiers = (0,) if size <= COMFORT * self.device else (0, 1)
        if tiers not in self._ahead:
            ranks = (one.rank[:2] for one in self.best.values() if one.tier in tiers)
            self._ahead[tiers] = nsmallest(self.wanted, ranks)
        ahead = self._ahead[tiers]
        if len(ahead) < self.wanted:
            return inf
        tier, seconds = ahead[self.wanted - 1]
        return -inf if tier < tiers[-1] else seconds

    def widens(self, seconds: float, size: float) -> bool:
        """Whether a candidate of this time and size can be part of the frontier."""
        if size > self.device:
            return False
        fastest = min((one.seconds for one in self.frontier), default=inf)
        return seconds < REACH * fastest and not self.dominated(seconds, size)

    @property
    def ranked(self) -> list[Candidate]:
        """The wanted candidates, one of each layout, the best first."""
        return sorted(self.best.values(), key=lambda one: one.rank)[: self.wanted]


def _state_bytes(plan: Plan) -> float:
    """Bytes of weights, gradients and optimizer state, of the end stage with most."""
    ends = {0, plan.layout.pipeline - 1}
    held = (state_bytes(plan.config, plan.layout, plan.parameters(stage)) for stage in ends)
    outside = plan.config.hardware.outside_gb(plan.layout.world)
    return max(one.device for one in held) + outside * GB


class Search:
    """A search of `space`.

    Args:
        assumptions: of all plans; None takes those of the space's kernels.
    """

    def __init__(self, space: Space, assumptions: Assumptions | None = None) -> None:
        self.space = space
        self.vocab, self.source = vocabulary(space.config)
        self.assumptions = assumptions or assumptions_of(space.config)
        self.bounds = Bounds(space, self.vocab, self.assumptions)
        self.evaluated = 0
        """Step times that were computed."""
        self.opened = 0
        """Cells whose options were looked at."""

    def plan(self, layout: Layout, options: Options) -> Plan:
        """The plan of a layout with options."""
        config = options.applied(with_layout(self.space.config, layout))
        return Plan(config, layout, self.vocab, self.source, assumptions=self.assumptions)

    def seconds(self, plan: Plan) -> float:
        """Predicted time of a step; where layouts make steps of different sizes, of as many tokens
        as one replica of all ranks makes.
        """
        self.evaluated += 1
        return step_time(plan).step * self._scale(plan.layout)

    def _scale(self, layout: Layout) -> float:
        same = self.space.config.batch.global_ is not None
        return 1.0 if same else self.space.world / layout.data

    def cells(self) -> list[Cell]:
        """All cells, the least bound first."""
        cells = [
            Cell(layout, micro, self.bounds.least(layout, micro) * self._scale(layout))
            for layout in self.space.layouts()
            for micro in self.space.micros(layout)
        ]
        return sorted(cells, key=lambda cell: cell.bound)

    def explore(
        self, wanted: int = 5, *, below: float = inf, pareto: bool = False, effort: float = inf
    ) -> Results:
        """The `wanted` best layouts, each with its best options.

        Args:
            below: seconds that a candidate must beat to be of interest.
            pareto: keep the whole frontier of time and memory, out to `REACH` x the fastest.
            effort: step times after which no further cell is opened; the most promising come first.
        """
        results = Results(wanted, self.space.config.hardware.memory_gb * GB)

        def useful(seconds: float, size: float) -> bool:
            if seconds < below and seconds <= results.limit(size):
                return True
            listing = pareto and self.opened + self.evaluated < LISTED
            return listing and results.widens(seconds, size)

        # Cells come twice: by the bound of their passes, then with the update added.
        heap = [(cell.bound, number, cell) for number, cell in enumerate(self.cells())]
        refined: set[int] = set()
        while heap and useful((entry := heappop(heap))[0], 0.0) and self.evaluated < effort:
            _, number, cell = entry
            if number not in refined:
                refined.add(number)
                bound = self.bounds.with_update(cell.layout, cell.micro)
                cell = replace(cell, bound=bound * self._scale(cell.layout))
                heappush(heap, (cell.bound, number, cell))
                continue
            self.opened += 1
            self._open(cell, results, useful)
        return results

    def _open(self, cell: Cell, results: Results, useful: Callable[[float, float], bool]) -> None:
        space, layout, choices = self.space, cell.layout, self.space.choices
        easy = replace(space.easiest, micro=cell.micro)
        if not space.legal(self.plan(layout, easy).config, layout):
            return
        light = self.plan(layout, replace(easy, recompute=space.least_memory))
        least = _state_bytes(light)
        if not useful(cell.bound, least):
            return
        exact = False
        for values in product(choices.overlap, choices.dispatcher, choices.distributed):
            overlap, dispatcher, distributed = values
            exchange = overlap, dispatcher
            bound = self.bounds.of(layout, cell.micro, exchange, distributed=distributed)
            if not useful(bound * self._scale(layout), least):
                continue
            plain = self._first_legal(layout, cell.micro, *values)
            if plain is None or not useful(bound := self.seconds(plain), least):
                continue
            if not exact:
                least, exact = bytes_needed(light), True
            if not useful(bound, least):
                continue
            self._add(results, useful, plain, bound)
            for recompute in choices.recompute[1:]:
                plan = plain.under(replace(plain.config, recompute=recompute))
                if space.legal(plan.config, layout) and useful(s := self.seconds(plan), least):
                    self._add(results, useful, plan, s)

    def _first_legal(
        self, layout: Layout, micro: int, overlap: bool, dispatcher: str, distributed: bool
    ) -> Plan | None:
        """The fastest variant without recomputation; where it is refused, so are all with it."""
        choices = self.space.choices
        for reduce, gather in product(choices.reduce, choices.gather):
            options = Options(
                micro, choices.recompute[0], overlap, dispatcher, distributed, reduce, gather
            )
            plan = self.plan(layout, options)
            if self.space.legal(plan.config, layout):
                return plan
        return None

    def _add(
        self, results: Results, useful: Callable[[float, float], bool], plan: Plan, seconds: float
    ) -> None:
        if useful(seconds, size := bytes_needed(plan)):
            results.add(Candidate(plan, seconds, size))

    def smallest(self, wanted: int = 5) -> list[Candidate]:
        """The layouts that need least memory, one each, where nothing fits."""
        space, results = self.space, Results(wanted, 0.0)
        for layout in space.layouts():
            micro, done = space.micros(layout)[0], set()
            for options in space.options(layout, micro):
                # What else differs needs no memory.
                kind = (*options.recompute.modules, options.recompute.layers, options.distributed)
                if (kind, options.overlap) not in done:
                    done.add((kind, options.overlap))
                    plan = self.plan(layout, options)
                    results.add(Candidate(plan, self.seconds(plan), bytes_needed(plan)))
        return results.ranked
