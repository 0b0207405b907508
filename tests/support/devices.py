"""Faked device tables, and the plan that follows from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from moe_train.backend.cuda.devices import Gpu
from moe_train.config.hardware import MachineFacts
from moe_train.errors import EXIT_CONFIG, ConfigError
from moe_train.parallel.resolved import ResolvedRun
from moe_train.planner.estimate import estimate
from moe_train.planner.legality import check
from moe_train.planner.machine.devices import Place, RankTable, decide_device
from moe_train.planner.resolution import resolve_run

H100 = ("NVIDIA H100 80GB HBM3", 85.5)
A100 = ("NVIDIA A100-SXM-64GB", 68.2)
RTX = ("NVIDIA GeForce RTX 4090", 25.8)


def node(gpus: int, kind: tuple[str, float] = H100, name: str = "a") -> tuple[Gpu, ...]:
    """GPUs of one node, all of a kind (name and GB)."""
    return tuple(Gpu(f"GPU-{name}{index}", *kind) for index in range(gpus))


def tables(*nodes: tuple[int, tuple[Gpu, ...]]) -> list[RankTable]:
    """Tables of (ranks, GPUs) for each node."""
    world = sum(ranks for ranks, _ in nodes)
    ranked: list[RankTable] = []
    for ranks, gpus in nodes:
        ranked += [
            RankTable(Place(len(ranked) + local, world, local, ranks), gpus)
            for local in range(ranks)
        ]
    return ranked


def outcome(seen: Sequence[RankTable], *overrides: str) -> ResolvedRun | str:
    """The plan from tables that went through the store, or the refusal's text."""
    texts = [json.dumps(table.to_mapping()) for table in seen]
    copies = [RankTable.from_mapping(json.loads(text)) for text in texts]
    assert copies == list(seen), "a table changes on its way through the store"
    wanted = next((word[7:] for word in overrides if word.startswith("device=")), "auto")
    try:
        facts = decide_device(wanted, copies)
    except ConfigError as refused:
        assert refused.exit_code == EXIT_CONFIG
        return str(refused)
    return on(replace(facts, notes=()), overrides)


@cache
def on(facts: MachineFacts, overrides: tuple[str, ...]) -> ResolvedRun:
    """The plan of a run is a function of these two alone."""
    return resolve_run(overrides, facts.count, facts)


def sensible(plan: ResolvedRun, world: int, device: str) -> None:
    """A plan that can run as it stands."""
    config, layout = plan.config, plan.layout
    assert config.device == device
    assert layout.world == world
    assert not check(config, world)
    if device != "cpu":
        assert config.hardware.kind == "accelerator"
        assert estimate(plan).fits
