"""Balancing methods of the router: losses, biases, what each sums over which ranks.

Sources: Megatron-Core 0.19, transformer/moe/router.py and distributed/finalize_model_grads.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe_train.features.dispatchers import Collective

SCORE = 4
"""Bytes of a loss term (fp32)."""


@dataclass(frozen=True)
class PerRank:
    """Why a curve depends on the layout: Megatron computes an option on each rank."""

    reason: str
    dimensions: tuple[str, ...]
    """Dimensions that change the curve where they are larger than 1."""


@dataclass(frozen=True)
class Balancing:
    """One value of ``model.router.balancing``, or ``model.router.expert_bias``."""

    name: str
    about: str
    megatron: str = "none"
    """Megatron's moe_router_load_balancing_type."""
    weighted: bool = False
    """Whether it is a loss with the weight model.router.aux_coeff."""
    collectives: tuple[Collective, ...] = ()
    """Of the router, for a micro-batch and layer."""
    step_groups: tuple[str, ...] = ()
    """Group kinds in which it communicates once a step."""
    state: tuple[str, ...] = ()
    """Tensors of the router that checkpoints hold, and that a resumed run must have as well."""
    excludes: tuple[str, ...] = ()
    """Keys of model.router that cannot be used with it."""
    computes_scores: bool = False
    """Whether it takes the place of model.router.score."""
    plain_top_k: bool = True
    """Whether evaluation is a top-k of the scores, as in models without the method."""
    per_rank: PerRank | None = None
    """None: every layout gives the same curve."""


def _loss(group: str, sequences: bool = False) -> tuple[Collective, ...]:
    """Each loss sums the tokens of every expert over the ranks that share its tokens."""
    return (
        Collective("auxiliary loss, all-reduce", "all_reduce", group, "router",
                   lambda z, _: z.E * SCORE * (z.A // z.T if sequences else 1),
                   "4 E B" if sequences else "4 E", 1, 0),
    )  # fmt: skip


_RANK_TOKENS = "one rank's tokens of a micro-batch"
_CUT = ("parallel.tensor", "parallel.context")

BALANCING = {
    one.name: one
    for one in (
        Balancing(
            name="aux",
            about="loss on each micro-batch (Switch Transformer, arXiv:2101.03961)",
            megatron="aux_loss",
            weighted=True,
            collectives=_loss("tp_cp"),
        ),
        Balancing(
            name="seq_aux",
            about="loss on each sequence (DeepSeek-V3, arXiv:2412.19437)",
            megatron="seq_aux_loss",
            weighted=True,
            collectives=_loss("tp_cp", sequences=True),
        ),
        Balancing(
            name="global_aux",
            about="loss on the tokens of a step so far, of all replicas (arXiv:2501.11873)",
            megatron="global_aux_loss",
            weighted=True,
            collectives=_loss("tp_dp_cp"),
            per_rank=PerRank(
                "counts tokens of all micro-batches that came before it, several replicas' at a "
                "time",
                ("data parallelism",),
            ),
        ),
        Balancing(
            name="sinkhorn",
            about="routing by Sinkhorn's algorithm (S-BASE, arXiv:2202.01169), no loss",
            megatron="sinkhorn",
            excludes=("capacity_factor", "expert_bias", "groups"),
            computes_scores=True,
            plain_top_k=False,
            per_rank=PerRank(f"balances {_RANK_TOKENS}", _CUT),
        ),
        Balancing(name="none", about="no loss"),
    )
}

EXPERT_BIAS = Balancing(
    name="expert_bias",
    about="bias on the choice, updated once a step by Megatron's finalize_model_grads; no loss "
    "(arXiv:2408.15664)",
    step_groups=("tp_dp_cp",),
    state=("expert_bias",),
    plain_top_k=False,
)

CAPACITY = PerRank(f"an expert's capacity is a share of {_RANK_TOKENS}", _CUT)
"""Of model.router.capacity_factor."""
RANDOM = PerRank("every rank draws its own random experts", (*_CUT, "data parallelism"))
"""Of model.router.force_balance."""


def methods(balancing: str, *, aux_coeff: float, expert_bias: bool) -> Iterator[Balancing]:
    """The methods in effect: a loss without weight and ``none`` are not."""
    chosen = BALANCING[balancing]
    if chosen.name != "none" and (aux_coeff or not chosen.weighted):
        yield chosen
    if expert_bias:
        yield EXPERT_BIAS
