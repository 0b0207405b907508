"""Which process groups of a layout a training step really uses: each costs a communicator.

Megatron-Core makes some twenty groups a rank. NCCL creates a group's communicator, with device
buffers, in its first collective, so that groups which nobody uses cost nothing; groups of one rank
have none at all (:mod:`moe_train.backend.local_group`).
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_train.config.root import Config
from moe_train.parallel.layout import Layout

WORLD = "world"
OPTIMIZER = "optimizer"
"""Two groups of all ranks, beside the kinds that `Layout.groups` knows: the world itself, and that
in which the distributed optimizer sums norms."""


def used_kinds(config: Config, layout: Layout) -> list[str]:
    """The kinds of groups that training steps use, where they have more than one rank.

    Interleaved schedules (``parallel.virtual_pipeline``) send outside of batches, for which NCCL
    adds a communicator for each pair of neighbours.
    """
    stage, whole = not layout.span, config.optim.distributed
    # Megatron's own linear layers count experts among the dense parts where both are cut alike.
    apart = layout.expert_in_stage > 1 or layout.tensor != layout.expert_tensor
    router = config.model.router
    kinds = {
        "tp": True,
        "pp": True,
        "cp": True,
        # Gradients of the dense parts, and of the experts.
        "dp_cp": True,
        "edp": apart,
        # Norms of the gradients of both; with placement=span mp exchanges the tokens as well.
        "mp": layout.span or not whole,
        "tp_ep_pp": apart and not whole,
        "ep": stage,
        "tp_ep": stage,
        "etp": stage,
        # Loads of the experts, which the router's losses and biases are made of.
        "tp_cp": router.balancing in ("aux", "seq_aux") and router.aux_coeff > 0,
        "tp_dp_cp": (router.balancing == "global_aux" and router.aux_coeff > 0)
        or router.expert_bias,
    }
    return [WORLD, *([OPTIMIZER] if whole else []), *(kind for kind, used in kinds.items() if used)]


def communicators(
    config: Config, layout: Layout, groups: Mapping[str, list[list[int]]]
) -> dict[str, int]:
    """How many ranks share each communicator that a rank opens, by kind; singletons have none.

    Args:
        groups: of the layout, by every kind.
    """
    sizes = {
        kind: layout.world if kind in (WORLD, OPTIMIZER) else len(groups[kind][0])
        for kind in used_kinds(config, layout)
    }
    return {kind: size for kind, size in sizes.items() if size > 1}
