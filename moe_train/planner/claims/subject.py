"""A plan that claims are about, and the register of quantities that can be asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from moe_train.config.root import Config
from moe_train.parallel.layout import Layout
from moe_train.parallel.shapes import Assumptions, shapes
from moe_train.parallel.vocabulary import vocabulary
from moe_train.planner.cost.timing import StepTime, step_bubble, step_time
from moe_train.planner.memory.stages import StageMemory, plan_memory, worst


@dataclass(frozen=True)
class Subject:
    """A plan whose quantities are asked for."""

    config: Config
    layout: Layout
    assumptions: Assumptions

    @cached_property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""
        return vocabulary(self.config)[0]

    @cached_property
    def stages(self) -> list[StageMemory]:
        """Memory of every stage."""
        return plan_memory(self.config, self.layout, self.vocab, self.assumptions)

    @cached_property
    def fullest(self) -> StageMemory:
        """The stage that needs most memory."""
        return worst(self.stages)

    @cached_property
    def time(self) -> StepTime:
        """Predicted step."""
        return step_time(self.config, self.layout, self.vocab, self.assumptions)

    def bubble(self, microbatches: int) -> float:
        """The layout's bubble with another number of micro-batches."""
        z = shapes(self.config, self.layout, self.vocab, self.assumptions)
        return step_bubble(self.config, self.layout, z, self.time.layer, microbatches)

    @property
    def layer_is_recomputed(self) -> bool:
        """Whether most layers are recomputed whole."""
        chosen = self.config.recomputed_layers
        return 2 * len(chosen) > self.config.model.layers

    def changed(self, config: Config) -> Subject:
        """The same layout and assumptions under another config."""
        return replace(self, config=config)

    def recomputing(self, layers: str) -> Subject:
        """The plan with another set of recomputed layers."""
        return self.changed(
            replace(self.config, recompute=replace(self.config.recompute, layers=layers))
        )


@dataclass(frozen=True)
class Quantity:
    """How to compute a number and how to say it."""

    compute: Callable[[Subject], float]
    unit: str
    meaning: str
    detail: Callable[[Subject], str] | None = None
    """What the number is about, where that follows from the plan (a layout's overrides, say)."""

    def named(self, subject: Subject) -> str:
        """The meaning, with the detail in parentheses."""
        told = self.detail(subject) if self.detail else ""
        return f"{self.meaning} ({told})" if told else self.meaning


QUANTITIES: dict[str, Quantity] = {}
"""All quantities by name."""


def quantity(
    name: str, unit: str, meaning: str, detail: Callable[[Subject], str] | None = None
) -> Callable[..., Callable[[Subject], float]]:
    """Register a function as the quantity `name`."""

    def register(compute: Callable[[Subject], float]) -> Callable[[Subject], float]:
        assert name not in QUANTITIES
        QUANTITIES[name] = Quantity(compute, unit, meaning, detail)
        return compute

    return register
