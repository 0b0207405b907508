"""`estimate`: what a resolved run needs and how fast it will be; the planner's facade.

The training path imports this module, and none of the planner behind it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from moe_train.config.kernels import KernelChoice
from moe_train.errors import ConfigError
from moe_train.parallel.parameters import ModelParameters, model_parameters
from moe_train.parallel.resolved import ResolvedRun
from moe_train.parallel.shapes import Assumptions
from moe_train.planner.cost.communication import Traffic, step_traffic
from moe_train.planner.cost.compute import peak_flops as peak_flops
from moe_train.planner.cost.timing import StepTime, step_time
from moe_train.planner.memory.fit import lighter, margin_warning, memory_fault
from moe_train.planner.memory.stages import GB as GB
from moe_train.planner.memory.stages import StageMemory, plan_memory, worst
from moe_train.planner.plan import Plan
from moe_train.planner.report.plan_report import plan_report


class Estimate(Plan):
    """Predictions of a plan, each computed when it is first read."""

    @cached_property
    def memory(self) -> list[StageMemory]:
        """Peak memory of every pipeline stage."""
        return plan_memory(self)

    @property
    def worst(self) -> StageMemory:
        """The stage that needs most memory."""
        return worst(self.memory)

    @property
    def fits(self) -> bool:
        """Whether every stage fits the hardware profile's memory."""
        return self.worst.margin >= 0

    @property
    def margin_warning(self) -> str | None:
        """A sentence where little memory is left, or none; None where there is enough."""
        return margin_warning(self.worst)

    @property
    def memory_fault(self) -> ConfigError | None:
        """Why the plan does not fit, with overrides that would make it fit; None if it fits."""
        return memory_fault(self)

    def lighter(self) -> list[tuple[str, float]]:
        """Overrides with which the worst stage needs less, and its bytes then; least first."""
        return lighter(self)

    @cached_property
    def time(self) -> StepTime:
        """Predicted optimizer step."""
        return step_time(self)

    def bubble(self, microbatches: int) -> float:
        """The pipeline's bubble with another number of micro-batches in a flush."""
        batch = replace(self.config.batch, microbatches=microbatches, accumulation=1, global_=None)
        return self.under(replace(self.config, batch=batch)).time.bubble

    @property
    def parameter_counts(self) -> ModelParameters:
        """Parameters of the whole model."""
        return model_parameters(self.config.model, self.vocab)

    @property
    def communication(self) -> list[Traffic]:
        """Collectives of one step on a rank of the middle stage."""
        return step_traffic(self, self.layout.pipeline // 2)

    def report(self, kernels: KernelChoice | None = None) -> dict[str, Any]:
        """The content of ``plan.json``.

        Args:
            kernels: the kernel set of a run; None for the one that it would choose.
        """
        return plan_report(self, self.memory, self.time, kernels)


def estimate(run: ResolvedRun, assumptions: Assumptions | None = None) -> Estimate:
    """Estimate of `run`; by default under the assumptions of `assumptions_of`."""
    return Estimate.of(run, assumptions)
