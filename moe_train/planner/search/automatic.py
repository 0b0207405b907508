"""The layout that ``parallel=auto`` takes: the search's, for the sizes that are open."""

from __future__ import annotations

from moe_train.config.root import Config
from moe_train.parallel.layout import Layout
from moe_train.parallel.sizes import layout_of, legal_layouts, reference_layout, with_layout
from moe_train.planner.search.candidate import OPTIONS
from moe_train.planner.search.explore import Search
from moe_train.planner.search.space import SIZES, Space


def resolve(config: Config, world: int) -> Config:
    """A copy of `config` with every parallel size filled in for `world` ranks.

    Sizes that are set stay. With ``parallel.auto`` the others come from ``parallel.reference``, or
    from the search; without it they are 1, and ``parallel.expert`` follows the placement.
    `moe_train.planner.legality.check` reports whether the result is legal; this raises nothing.
    """
    layout = _automatic(config, world) if config.parallel.auto else layout_of(config, world)
    return with_layout(config, layout)


def _automatic(config: Config, world: int) -> Layout:
    """The layout that ``parallel.auto`` takes; an illegal one if none is legal.

    Options beside the layout have values of their own in every config and stay as they are:
    ``moe-train tune`` searches them as well.
    """
    if reference := reference_layout(config, world):
        return reference
    sizes = {f"parallel.{name}" for name in SIZES if getattr(config.parallel, name) is not None}
    search = Search(Space(config, world, {*OPTIONS, *sizes}))
    if chosen := search.explore(1).ranked or search.smallest(1):
        return chosen[0].layout
    # A value that no layout mends: its fault is the user's to read, without others beside it.
    legal = legal_layouts(config, world)
    return legal[0] if legal else layout_of(config, world)
