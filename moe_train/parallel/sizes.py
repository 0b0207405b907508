"""Parallel sizes that the user left open, and all legal layouts of a number of ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

from moe_train.config.root import Config
from moe_train.config.types import Placement
from moe_train.parallel.layout import Layout, divisors
from moe_train.parallel.rules import layout_faults
from moe_train.parallel.stages import layers_of, text_of


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
        stages=layers_of(parallel.stages),
        mtp_layers=model.mtp_layers,
    )


def with_layout(config: Config, layout: Layout) -> Config:
    """A copy of `config` that asks for exactly `layout`."""
    parallel = replace(
        config.parallel,
        auto=False,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        context=layout.context,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        placement=layout.placement,
        stages=text_of(layout.stages, layout.mtp_layers) if layout.stages else "",
    )
    return replace(config, parallel=parallel)


def reference_layout(config: Config, world: int) -> Layout | None:
    """The layout of ``parallel.reference``; None where it is of other ranks, or illegal.

    Sizes that are set explicitly win over its own; the expert-parallel size follows the placement.
    """
    given = config.parallel
    reference = Layout.from_tag(given.reference)
    if reference is None or reference.world != world:
        return None
    sizes = replace(
        given,
        tensor=given.tensor or reference.tensor,
        pipeline=given.pipeline or reference.pipeline,
        placement=given.placement or reference.placement,
    )
    layout = layout_of(replace(config, parallel=sizes), world)
    return layout if is_legal(config, layout) else None


def is_legal(config: Config, layout: Layout) -> bool:
    """Whether `layout` violates no rule."""
    return not any(True for _ in layout_faults(config, layout))


def legal_layouts(config: Config, world: int) -> list[Layout]:
    """Every legal layout of `world` ranks with the sizes that `config` sets explicitly.

    Context, virtual-pipeline and expert-tensor sizes vary only if they are set. The
    first is the best: most expert-parallel ranks, then fewest tensor ranks, then
    fewest stages. (No tensor ranks: no sequence-parallel traffic; no stages: no
    bubble; all-to-all is the one exchange that a MoE needs in any case.)
    """
    parallel, sizes = config.parallel, divisors(world)
    start = layout_of(config, world)
    layouts: list[Layout] = []
    for tensor, pipeline in product(
        [parallel.tensor] if parallel.tensor else sizes,
        [parallel.pipeline] if parallel.pipeline else sizes,
    ):
        if world % (tensor * pipeline * start.context):
            continue
        experts = [tensor * pipeline] if start.span else divisors(world // pipeline)
        for expert in [parallel.expert] if parallel.expert else experts:
            layout = replace(start, tensor=tensor, pipeline=pipeline, expert=expert)
            if is_legal(config, layout):
                layouts.append(layout)
    return sorted(layouts, key=lambda one: (-one.expert, one.tensor, one.pipeline))


def nearest_layouts(config: Config, wanted: Layout, count: int = 4) -> list[Layout]:
    """The nearest legal layouts of ``wanted.world`` ranks with ``placement=stage``.

    All sizes are free. Distance is the sum over dimensions of the ratio of sizes, in
    powers of two.
    """
    parallel = replace(config.parallel, tensor=None, pipeline=None, expert=None, placement="stage")
    candidates = legal_layouts(replace(config, parallel=parallel), wanted.world)
    if not candidates:
        parallel = replace(parallel, virtual_pipeline=None, expert_tensor=None, context=None)
        candidates = legal_layouts(replace(config, parallel=parallel), wanted.world)

    def distance(one: Layout) -> tuple[float, int]:
        pairs = (
            (one.tensor, wanted.tensor),
            (one.pipeline, wanted.pipeline),
            (one.expert, wanted.expert),
            (one.expert_tensor, wanted.expert_tensor),
            (one.context, wanted.context),
        )
        return sum(abs(math.log2(a / b)) for a, b in pairs), -one.expert

    return sorted(candidates, key=distance)[:count]


DEFAULT_WORLD = 8
"""Ranks that ``parallel.auto`` is planned for where none are given."""


def natural_world(config: Config) -> int:
    """Ranks that the sizes of `config` need; with ``parallel.auto`` a multiple of 8."""
    sizes = config.parallel
    stages = sizes.pipeline or 1
    dense = (sizes.tensor or 1) * (sizes.context or 1) * stages
    expert = (sizes.expert or 1) * (1 if sizes.placement == "span" else stages)
    needed = math.lcm(dense, expert * (sizes.expert_tensor or 1))
    return math.lcm(needed, DEFAULT_WORLD) if sizes.auto else needed
