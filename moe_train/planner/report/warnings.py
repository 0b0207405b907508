"""What a plan leaves out or cannot promise, as sentences."""

from __future__ import annotations

from moe_train.parallel.rules import per_rank_options
from moe_train.planner.estimate import Estimate
from moe_train.planner.machine.profiles import unknown_device_warning
from moe_train.planner.overrides import unpriced_note


def plan_warnings(plan: Estimate) -> list[str]:
    """Warnings about a legal plan, the gravest first."""
    config, layout = plan.config, plan.layout
    sentences = [*plan.notes]
    if (fault := plan.memory_fault) and config.hardware.kind == "cpu":
        sentences.append(f"{fault.problem}; {fault.fix.replace(chr(10), ' ')}")
    elif tight := plan.margin_warning:
        sentences.append(tight)
    sentences += filter(None, [unpriced_note(config), unknown_device_warning(config.hardware)])
    sentences += per_rank_options(config, layout).values()
    cores = config.hardware.cores
    if 0 < cores < layout.world:
        sentences.append(
            f"{layout.world} ranks share {cores} cores: times vary with their queueing"
        )
    return sentences
