"""A few given layouts, ranked by predicted time; `moe_train.planner.search` finds them itself."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.config.root import Config
from moe_train.parallel.layout import Layout
from moe_train.parallel.resolved import vocabulary
from moe_train.parallel.sizes import with_layout
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
