"""Parallel sizes that the user left open: derived, or one."""

from __future__ import annotations

from moe_train.config.root import Config
from moe_train.config.types import Placement
from moe_train.parallel.layout import Layout


def divisors(number: int) -> list[int]:
    """All positive divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def default_expert(
    placement: str, world: int, tensor: int, pipeline: int, expert_tensor: int, experts: int
) -> int:
    """Expert-parallel size that a placement implies.

    stage: the most ranks of one stage that divide the experts evenly;
    span: every rank of a dense replica, tensor x pipeline.
    """
    if placement == "span":
        return tensor * pipeline
    per_stage = world // (pipeline * expert_tensor)
    return max((d for d in divisors(per_stage) if experts % d == 0), default=1)


def layout_of(config: Config, world: int) -> Layout:
    """The layout that `config` asks for on `world` ranks, legal or not.

    A null size is 1, except ``parallel.expert``, which follows the placement.
    """
    parallel, model = config.parallel, config.model
    tensor, pipeline = parallel.tensor or 1, parallel.pipeline or 1
    placement: Placement = parallel.placement or "stage"
    expert_tensor = parallel.expert_tensor or 1
    expert = parallel.expert or default_expert(
        placement, world, tensor, pipeline, expert_tensor, model.experts
    )
    return Layout(
        world=world,
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=parallel.virtual_pipeline or 1,
        context=parallel.context or 1,
        expert=expert,
        expert_tensor=expert_tensor,
        placement=placement,
        layers=model.layers,
        experts=model.experts,
    )
