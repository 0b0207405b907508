"""`Candidate`: a legal plan that a search yields, its time and its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from moe_train.config.root import Config
from moe_train.config.schema import value_at
from moe_train.parallel.layout import Layout
from moe_train.planner.cost.timing import StepTime, step_time
from moe_train.planner.memory.fit import TIGHT
from moe_train.planner.memory.stages import stage_memory
from moe_train.planner.plan import Plan

COMFORT = 1 - TIGHT
"""Share of a device's memory that a plan should need at most."""
OPTIONS = (
    "batch.micro",
    "recompute.layers",
    "recompute.modules",
    "parallel.overlap_expert_comm",
    "parallel.dispatcher",
    "optim.distributed",
    "parallel.overlap_grad_reduce",
    "parallel.overlap_param_gather",
)
"""Config keys that a search varies beside the layout."""


def bytes_needed(plan: Plan) -> float:
    """Bytes on the ranks of the end stages, of which one needs most."""
    return max(stage_memory(plan, stage).total for stage in {0, plan.layout.pipeline - 1})


@dataclass(frozen=True)
class Candidate:
    """A legal plan with its predictions. Smaller `rank` is better."""

    plan: Plan
    seconds: float
    """Predicted time of a step."""
    bytes: float
    """Memory of the rank that needs most."""

    @property
    def layout(self) -> Layout:
        """The plan's layout."""
        return self.plan.layout

    @property
    def config(self) -> Config:
        """The plan's config: every parallel size and every option set."""
        return self.plan.config

    @property
    def share(self) -> float:
        """Share of a device's memory that it needs."""
        return self.bytes / self.plan.device_bytes

    @property
    def margin(self) -> float:
        """Share of a device's memory that stays free; negative where it does not fit."""
        return 1 - self.share

    @property
    def fits(self) -> bool:
        """Whether it fits a device's memory."""
        return self.share <= 1

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.plan.tokens / self.seconds

    @cached_property
    def time(self) -> StepTime:
        """The step's time by what it is spent on."""
        return step_time(self.plan)

    @property
    def tier(self) -> int:
        """0 with room to spare (`COMFORT`), 1 where it just fits, 2 where it does not."""
        return 0 if self.share <= COMFORT else 1 if self.fits else 2

    @property
    def rank(self) -> tuple[float, ...]:
        """What candidates are sorted by.

        The fastest of those with room to spare, then of those that just fit; of those that do not,
        the smallest. Of equally fast ones the smaller, then the one with fewer ways of splitting.
        """
        if self.tier == 2:
            return (2, self.bytes, self.seconds, *self._simplicity)
        return (self.tier, self.seconds, self.bytes, *self._simplicity)

    @property
    def _simplicity(self) -> tuple[float, ...]:
        one, parallel = self.layout, self.config.parallel
        return (
            one.tensor * one.context * one.pipeline * one.expert_tensor,
            one.context,
            one.tensor,
            one.virtual_pipeline,
            one.span,
            parallel.overlap_expert_comm,
            parallel.dispatcher != "alltoall",
        )

    def overrides(self, base: Config) -> list[str]:
        """Overrides that make `base`, the config that the user composed, this candidate."""
        lines = self.layout.overrides()
        for name in ("context", "virtual_pipeline", "expert_tensor"):
            # A size of 1 is left out there, and has to undo another one here.
            size, given = getattr(self.layout, name), getattr(base.parallel, name)
            if size == 1 and given not in (None, 1):
                lines.append(f"parallel.{name}=1")
        if base.batch.global_ != self.config.batch.global_:
            lines.append(f"batch.global={self.plan.sequences}")
        lines += [
            f"{key}={_text(value_at(self.config, key))}"
            for key in OPTIONS
            if value_at(self.config, key) != value_at(base, key)
        ]
        return lines


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value)


STEP = 0.01
"""Share of a device's memory that a slower candidate must save to be listed."""


def frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one beats in time and memory, in steps of `STEP`; the fastest first."""
    chosen: list[Candidate] = []
    for one in sorted(candidates, key=lambda each: (each.seconds, each.bytes, each.rank)):
        if not chosen or one.bytes < chosen[-1].bytes - STEP * one.plan.device_bytes:
            chosen.append(one)
    return chosen
