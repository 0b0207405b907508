"""Process groups of a layout: which communicators a rank opens, and where experts are deployed.

Megatron-Core makes some twenty groups a rank. NCCL creates a group's communicator, with device
buffers, in its first collective, so unused groups cost nothing; groups of one rank have no
communicator at all (:mod:`moe_train.backend.local_group`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train.config.root import Config
from moe_train.parallel.layout import GROUPS, Layout

WORLD = "world"
OPTIMIZER = "optimizer"
"""Two groups of all ranks beside the kinds in `GROUPS`: the world itself, and the one over which
the distributed optimizer sums norms."""


def used_kinds(config: Config, layout: Layout) -> list[str]:
    """Kinds of groups in which a training step communicates, where they have more than one rank.

    Interleaved schedules (``parallel.virtual_pipeline``) send outside of batches, for which NCCL
    adds a communicator for each pair of neighbours.
    """
    stage, distributed = not layout.span, config.optim.distributed
    # Megatron's linear layers count experts among the dense parts where both are split alike.
    separate = layout.expert_in_stage > 1 or layout.tensor != layout.expert_tensor
    kinds = {
        "tp": True,
        "pp": True,
        "cp": True,
        # Gradients of the dense parts, and of the experts.
        "dp_cp": True,
        "edp": separate,
        # Norms of the gradients of both; with placement=span mp exchanges the tokens as well.
        "mp": layout.span or not distributed,
        "tp_ep_pp": separate and not distributed,
        "ep": stage,
        "tp_ep": stage,
        "etp": stage,
    }
    # Loads of the experts, for the router's losses and biases.
    for method in config.model.router.balancing_methods:
        kinds |= dict.fromkeys([one.group for one in method.collectives], True)
        kinds |= dict.fromkeys(method.step_groups, True)
    everybody = [WORLD, OPTIMIZER] if distributed else [WORLD]
    return [*everybody, *(kind for kind, used in kinds.items() if used)]


def communicators(
    config: Config, layout: Layout, groups: Mapping[str, list[list[int]]]
) -> dict[str, int]:
    """Ranks of each communicator that a rank opens, by kind; groups of one rank open none.

    Args:
        groups: of the layout, by every kind.
    """
    sizes = {
        kind: layout.world if kind in (WORLD, OPTIMIZER) else len(groups[kind][0])
        for kind in used_kinds(config, layout)
    }
    return {kind: size for kind, size in sizes.items() if size > 1}


def deployment(layout: Layout) -> dict[str, Any]:
    """Every (layer, expert) module and its host; a host is the ranks that hold the same modules.

    Several ranks in a host are replicas or, with expert tensor parallelism, shards.
    """
    ranks: dict[tuple[int, int], list[int]] = {}
    for rank in range(layout.world):
        place = layout.coordinates(rank)
        stage = 0 if layout.span else place.dense.pp
        ranks.setdefault((stage, place.expert.ep), []).append(rank)
    hosts = [ranks[key] for key in sorted(ranks)]
    modules = [
        {"layer": layer, "expert": expert, "host": number}
        for number, (first, *_) in enumerate(hosts)
        for layer in layout.expert_layers(first)
        for expert in layout.local_experts(first)
    ]
    modules.sort(key=lambda module: (module["layer"], module["expert"]))
    return {
        "hosts": hosts,
        "modules": modules,
        "patterns": {kind: group.traffic for kind, group in GROUPS.items() if group.traffic},
    }
