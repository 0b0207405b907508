"""Legal layouts of a world, the nearest to a wish, and the one that ``auto`` takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from moe_train.config.root import Config
from moe_train.config.types import Placement
from moe_train.parallel.layout import Layout
from moe_train.parallel.rules import layout_faults
from moe_train.parallel.sizes import default_expert, divisors, layout_of
from moe_train.parallel.vocabulary import vocabulary
from moe_train.planner.cost.timing import step_time
from moe_train.planner.memory.fit import assumptions_of, fits

MISSION = {"tensor": 2, "pipeline": 4}
"""What ``parallel=auto`` takes for a 16-layer model on 8 ranks."""


def legal_layouts(config: Config, world: int) -> list[Layout]:
    """Every legal layout of `world` ranks that keeps the sizes `config` sets explicitly.

    Context, virtual-pipeline and expert-tensor sizes vary only if they are set. The
    first is the best: most expert-parallel ranks, then fewest tensor ranks, then
    fewest stages. (No tensor ranks: no sequence-parallel traffic; no stages: no
    bubble; all-to-all is the one exchange that a MoE needs in any case.)
    """
    asked = config.parallel
    placement = asked.placement or "stage"
    context, chunks = asked.context or 1, asked.virtual_pipeline or 1
    expert_tensor = asked.expert_tensor or 1
    found: list[Layout] = []
    for tensor in [asked.tensor] if asked.tensor else divisors(world):
        for pipeline in [asked.pipeline] if asked.pipeline else divisors(world):
            if world % (tensor * pipeline * context):
                continue
            if asked.expert:
                experts = [asked.expert]
            elif placement == "span":
                experts = [tensor * pipeline]
            else:
                experts = divisors(world // pipeline)
            for expert in experts:
                layout = Layout(
                    world, tensor, pipeline, chunks, context, expert, expert_tensor, placement,
                    config.model.layers, config.model.experts,
                )  # fmt: skip
                if not any(True for _ in layout_faults(config, layout)):
                    found.append(layout)
    return sorted(found, key=lambda one: (-one.expert, one.tensor, one.pipeline))


def ranked(config: Config, layouts: Sequence[Layout]) -> list[Layout]:
    """`layouts` by predicted tokens per second, those that fit the device's memory first.

    Tokens and not steps: without ``batch.global`` more replicas mean larger steps. Equal
    predictions keep their order.
    """
    vocab, _ = vocabulary(config)

    def cost(layout: Layout) -> tuple[bool, float]:
        chosen = with_layout(config, layout)
        assumptions = assumptions_of(chosen)
        time = step_time(chosen, layout, vocab, assumptions)
        return not fits(chosen, layout, vocab, assumptions), time.step / time.tokens

    return sorted(layouts, key=cost)


def nearest_layouts(config: Config, asked: Layout, count: int = 4) -> list[Layout]:
    """The nearest legal layouts of ``asked.world`` ranks, the fastest of them first.

    All sizes are free. Distance is the sum over dimensions of the ratio of sizes, in
    powers of two.
    """
    free = dataclasses.replace(
        config,
        parallel=dataclasses.replace(
            config.parallel, tensor=None, pipeline=None, expert=None, placement="stage"
        ),
    )
    candidates = legal_layouts(free, asked.world)
    if not candidates:
        free.parallel = dataclasses.replace(
            free.parallel, virtual_pipeline=None, expert_tensor=None, context=None
        )
        candidates = legal_layouts(free, asked.world)

    def distance(one: Layout) -> tuple[float, int]:
        pairs = (
            (one.tensor, asked.tensor),
            (one.pipeline, asked.pipeline),
            (one.expert, asked.expert),
            (one.expert_tensor, asked.expert_tensor),
            (one.context, asked.context),
        )
        return sum(abs(math.log2(a / b)) for a, b in pairs), -one.expert

    return ranked(config, sorted(candidates, key=distance)[:count])


def _automatic(config: Config, world: int) -> Layout:
    """The layout that ``parallel.auto`` takes; an illegal one if none is legal."""
    if world == 8 and config.model.layers == 16:
        mission = _mission(config, world)
        if not any(True for _ in layout_faults(config, mission)):
            return mission
    if config.parallel.placement is None:
        config = with_placement(config, "stage")
    legal = legal_layouts(config, world)
    if not legal:
        return layout_of(config, world)
    # On a few ranks of one machine expert parallelism alone is what every backend does well;
    # predictions decide where there is a choice to lose something by.
    return legal[0] if world < 8 else ranked(config, legal)[0]


def _mission(config: Config, world: int) -> Layout:
    """TP2 x PP4, spanning unless another placement is asked for."""
    config = with_placement(config, config.parallel.placement or "span")
    asked = config.parallel
    tensor = asked.tensor or MISSION["tensor"]
    pipeline = asked.pipeline or MISSION["pipeline"]
    expert_tensor = asked.expert_tensor or 1
    assert asked.placement is not None
    expert = asked.expert or default_expert(
        asked.placement, world, tensor, pipeline, expert_tensor, config.model.experts
    )
    return dataclasses.replace(
        layout_of(config, world),
        tensor=tensor,
        pipeline=pipeline,
        expert=expert,
        expert_tensor=expert_tensor,
    )


def with_placement(config: Config, placement: Placement) -> Config:
    """A copy of `config` with `placement`."""
    return dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, placement=placement)
    )


def resolve(config: Config, world: int) -> Config:
    """A copy of `config` with every parallel size filled in for `world` ranks.

    Sizes that are set are kept. With ``parallel.auto`` the others come from the
    search (8 ranks and 16 layers: TP2 PP4; one rank: all 1), without it they are 1,
    and ``parallel.expert`` follows the placement. Whether the result is legal is for
    `moe_train.planner.legality.check` to say; this raises nothing.
    """
    layout = _automatic(config, world) if config.parallel.auto else layout_of(config, world)
    return with_layout(config, layout)


def with_layout(config: Config, layout: Layout) -> Config:
    """A copy of `config` that asks for exactly `layout`."""
    parallel = dataclasses.replace(
        config.parallel,
        auto=False,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        context=layout.context,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        placement=layout.placement,
    )
    return dataclasses.replace(config, parallel=parallel)


def planned(config: Config, world: int) -> Layout:
    """The layout of a resolved config (all parallel sizes set)."""
    return layout_of(config, world)
