"""Legal layouts ranked by predicted time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_train.config.root import Config
from moe_train.parallel.layout import Layout
from moe_train.parallel.resolved import vocabulary
from moe_train.parallel.sizes import layout_of, legal_layouts, reference_layout, with_layout
from moe_train.planner.cost.timing import step_time
from moe_train.planner.memory.fit import fits
from moe_train.planner.plan import Plan, assumptions_of


def ranked(config: Config, layouts: Sequence[Layout]) -> list[Layout]:
    """`layouts` by predicted tokens per second, those that fit the device's memory first.

    Tokens and not steps: without ``batch.global`` more replicas mean larger steps. Equal
    predictions stay in order.
    """
    vocab = vocabulary(config)[0]

    def cost(layout: Layout) -> tuple[bool, float]:
        chosen = with_layout(config, layout)
        plan = Plan(chosen, layout, vocab, assumptions=assumptions_of(chosen))
        time = step_time(plan)
        return not fits(plan), time.step / time.tokens

    return sorted(layouts, key=cost)


def resolve(config: Config, world: int) -> Config:
    """A copy of `config` with every parallel size filled in for `world` ranks.

    Sizes that are set stay. With ``parallel.auto`` the others come from ``parallel.reference``, or
    from the search; without it they are 1, and ``parallel.expert`` follows the placement.
    `moe_train.planner.legality.check` reports whether the result is legal; this raises nothing.
    """
    layout = _automatic(config, world) if config.parallel.auto else layout_of(config, world)
    return with_layout(config, layout)


def _automatic(config: Config, world: int) -> Layout:
    """The layout that ``parallel.auto`` takes; an illegal one if none is legal."""
    if reference := reference_layout(config, world):
        return reference
    if config.parallel.placement is None:
        config = replace(config, parallel=replace(config.parallel, placement="stage"))
    legal = legal_layouts(config, world)
    if not legal:
        return layout_of(config, world)
    # On a few ranks of one machine expert parallelism alone is what every backend does well;
    # predictions decide where there is a choice to lose something by.
    return legal[0] if world < 8 else ranked(config, legal)[0]
