"""Where every expert module lives, and what each process group is for."""

from __future__ import annotations

from typing import Any

from moe_train.parallel.layout import Layout

PATTERN = {
    "tp": "all-gather and reduce-scatter of activations, every layer",
    "cp": "ring exchange of keys and values, every layer",
    "dp_cp": "reduction of dense gradients, once a step",
    "pp": "activations to the next stage, gradients back, every micro-batch",
    "ep": "all-to-all of tokens, twice a layer in each direction",
    "etp": "all-gather and reduce-scatter of an expert's tokens, every layer",
    "edp": "reduction of expert gradients, once a step",
    "embd": "sum of a tied embedding's gradients, once a step",
    "mp": "gradient norm and agreement within a replica, once a step",
}
"""Communication pattern by group kind."""


def deployment(layout: Layout) -> dict[str, Any]:
    """Every (layer, expert) module and its host; a host is the ranks that hold the same modules.

    Several ranks in a host are replicas or, with expert tensor parallelism, shards.
    """
    ranks: dict[tuple[int, int], list[int]] = {}
    for rank in range(layout.world):
        place = layout.coordinates(rank)
        stage = 0 if layout.span else place.dense.pp
        ranks.setdefault((stage, place.expert.ep), []).append(rank)
    hosts = sorted(ranks)
    each = layout.experts // layout.expert
    modules: list[dict[str, int]] = []
    for number, (_, index) in enumerate(hosts):
        some = ranks[hosts[number]][0]
        for layer in layout.expert_layers(some):
            modules.extend(
                {"layer": layer, "expert": expert, "host": number}
                for expert in range(index * each, (index + 1) * each)
            )
    modules.sort(key=lambda module: (module["layer"], module["expert"]))
    return {
        "hosts": [ranks[host] for host in hosts],
        "modules": modules,
        "patterns": PATTERN,
    }
