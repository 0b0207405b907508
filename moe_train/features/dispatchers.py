"""Token dispatchers: how rows reach their experts, in which collectives, under which conditions.

Expert parallelism exchanges tokens twice forward and twice backward (GShard, arXiv:2006.16668).
The collectives are those that Megatron-Core 0.19 calls (transformer/moe/token_dispatcher.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Any

COUNT, PROBABILITY = 8, 4
"""Bytes of a row count (int64) and of a routing probability (fp32)."""


@dataclass(frozen=True)
class Collective:
    """One kind of collective that a layer makes for a micro-batch."""

    name: str
    operation: str
    """A function of `moe_train.planner.cost.links`."""
    group: str
    """Group kind, as in `Layout.groups`."""
    part: str
    """dispatch or combine."""
    size: Callable[[Any, int], float]
    """Bytes, unsharded, from `moe_train.parallel.shapes.Shapes` and the ranks of the group."""
    formula: str
    """The same in the letters of `moe_train.parallel.shapes`, for reports."""
    forward: int = 1
    """Calls of a forward pass."""
    backward: int = 1
    unpadded: bool = False
    """Only without model.router.pad_to_capacity, under which every count is known."""
    routed: bool = False
    """Whether its bytes follow the routing, so that all ranks wait for the busiest one."""


@dataclass(frozen=True)
class Dispatcher:
    """One value of ``parallel.dispatcher``, or the exchange of ``parallel.placement=span``."""

    name: str
    about: str
    collectives: tuple[Collective, ...]
    megatron: str = "alltoall"
    """Megatron's moe_token_dispatcher_type; the one that `layer` replaces, where there is one."""
    layer: str = ""
    """``module:class`` of the MoELayer that uses it; empty for Megatron's own."""
    pads: bool = True
    """Whether it can pad experts to their capacity (model.router.pad_to_capacity)."""
    single: bool = True
    """Whether it runs with ETP x EP = 1."""
    overlaps: bool = True
    """Whether Megatron's combined 1F1B hides it (parallel.overlap_expert_comm)."""
    fused_permutation: bool = False
    """Whether it needs TransformerEngine's permutation."""
    launches: tuple[int, int] = (17, 25)
    """Kernels of a forward and of a backward pass, permutations included: counted in
    token_dispatcher.py with TransformerEngine's fused permutation."""


@lru_cache(maxsize=1024)
def reached(parts: int, experts: int, chosen: int, groups: int = 0, taken: int = 0) -> float:
    """Share of tokens with an expert in one of `parts` equal parts of all experts.

    `chosen` of `experts` are drawn at random; with group-limited routing out of `taken` of `groups`
    equal groups, themselves drawn at random. Hypergeometric.
    """
    if not groups:
        return 1.0 - _missed(experts, experts // parts, chosen)
    # Of a part's experts as many can be chosen as lie in chosen groups: a part is some whole
    # groups, or lies in one.
    inside = max(groups // parts, 1)
    each = min(experts // groups, experts // parts)
    total = comb(groups, taken)
    share = 0.0
    for hit in range(1, min(inside, taken) + 1):
        ways = comb(inside, hit) * comb(groups - inside, taken - hit) / total
        share += ways * (1.0 - _missed(experts // groups * taken, hit * each, chosen))
    return share


def _missed(experts: int, there: int, chosen: int) -> float:
    """Chance that none of `chosen` of `experts` is among `there`."""
    return comb(experts - there, chosen) / comb(experts, chosen)


def _rows(z: Any, _: int) -> float:
    return float(z.N * z.K * z.H * z.b)


def _received(z: Any, _: int) -> float:
    return float(z.R * z.H * z.b)


def _scores(z: Any, _: int) -> float:
    return float(z.R * PROBABILITY)


_BACK = Collective(
    "experts, rows back", "all_to_all", "ep", "combine", _rows, "N K H b", routed=True
)
_TENSOR = "expert tensor parallel"
# Rows, as many as were routed, are shared by the ranks that hold parts of the same experts.
_EXPERT_TENSOR = (
    Collective(f"{_TENSOR}, gather", "all_gather", "etp", "dispatch", _received, "R H b", 1, 0),
    Collective(f"{_TENSOR}, scatter back", "uneven_reduce_scatter", "etp", "dispatch",
               _received, "R H b", 0, 1),
    Collective(f"{_TENSOR}, probabilities", "all_gather", "etp", "dispatch", _scores, "4 R", 1, 0),
    Collective(f"{_TENSOR}, probabilities back", "uneven_reduce_scatter", "etp", "dispatch",
               _scores, "4 R", 0, 1),
    Collective(f"{_TENSOR}, scatter", "uneven_reduce_scatter", "etp", "combine",
               _received, "R H b", 1, 0),
    Collective(f"{_TENSOR}, gather back", "all_gather", "etp", "combine",
               _received, "R H b", 0, 1),
)  # fmt: skip


def _gathered(z: Any, ranks: int) -> float:
    return float(z.N * ranks * z.H * z.b)


def _gathered_scores(z: Any, ranks: int) -> float:
    return float(z.N * ranks * z.E * PROBABILITY)


DISPATCHERS = {
    one.name: one
    for one in (
        Dispatcher(
            name="alltoall",
            about="each row goes to the rank of its expert; counts are gathered first",
            collectives=(
                Collective("experts, counts", "all_gather", "tp_ep", "dispatch",
                           lambda z, ranks: ranks * z.E * COUNT, "8 E e x", 1, 0, unpadded=True),
                Collective("experts, rows out", "all_to_all", "ep", "dispatch", _rows, "N K H b",
                           routed=True),
                Collective("experts, probabilities", "all_to_all", "ep", "dispatch",
                           lambda z, _: z.N * z.K * PROBABILITY, "4 N K", routed=True),
                _BACK,
                *_EXPERT_TENSOR,
            ),
        ),
        Dispatcher(
            name="allgather",
            about="every rank gets all tokens of the group and adds its experts' results up",
            megatron="allgather",
            overlaps=False,
            collectives=(
                Collective("experts, routing map", "all_gather", "tp_ep", "dispatch",
                           lambda z, ranks: z.N * ranks * z.E, "N e x E", 1, 0),
                Collective("experts, probabilities", "all_gather", "tp_ep", "dispatch",
                           _gathered_scores, "4 N e x E", 1, 0),
                Collective("experts, tokens", "all_gather", "tp_ep", "dispatch",
                           _gathered, "N e x H b", 1, 0),
                Collective("experts, probabilities back", "reduce_scatter", "tp_ep", "dispatch",
                           _gathered_scores, "4 N e x E", 0, 1),
                Collective("experts, tokens back", "reduce_scatter", "tp_ep", "dispatch",
                           _gathered, "N e x H b", 0, 1),
                Collective("experts, results", "reduce_scatter", "tp_ep", "combine",
                           _gathered, "N e x H b", 1, 0),
                Collective("experts, results back", "all_gather", "tp_ep", "combine",
                           _gathered, "N e x H b", 0, 1),
            ),
        ),
        Dispatcher(
            name="flex",
            about="DeepEP or HybridEP: one kernel sends a row once to each node, with its "
            "probabilities",
            megatron="flex",
            pads=False,
            single=False,
            fused_permutation=True,
            launches=(9, 17),
            collectives=(
                Collective("experts, rows out", "once_a_node", "ep", "dispatch",
                           lambda z, _: z.N * (z.H * z.b + z.K * PROBABILITY),
                           "N (H b + 4 K), to each node with an expert", routed=True),
                Collective("experts, rows back", "once_a_node", "ep", "combine",
                           lambda z, _: z.N * z.H * z.b, "N H b, from each node", routed=True),
                *_EXPERT_TENSOR,
            ),
        ),
    )
}  # fmt: skip

SPAN = Dispatcher(
    name="span",
    about="rows packed with their probabilities go to all stages of a replica (model/span)",
    layer="moe_train.model.span.layer:SpanMoELayer",
    # Both sides know the counts by the time of the backward pass.
    collectives=(
        Collective("experts, counts", "all_to_all", "ep", "dispatch",
                   lambda z, _: z.E * COUNT, "8 E", 1, 0),
        Collective("experts, rows and probabilities", "all_to_all", "ep", "dispatch",
                   lambda z, _: z.N * z.K * z.packed_row,
                   "N K (H b + 4), rows in multiples of 16", routed=True),
        Collective("experts, results", "all_to_all", "ep", "combine", _rows, "N K H b",
                   routed=True),
    ),
)  # fmt: skip


def dispatcher(name: str, *, span: bool) -> Dispatcher:
    """The one that a run uses: of ``parallel.dispatcher``, or of ``parallel.placement=span``."""
    return SPAN if span else DISPATCHERS[name]
