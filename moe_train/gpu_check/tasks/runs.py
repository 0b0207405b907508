"""Runs of the product inside a worker: training, plans, initial weights, dry runs."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_train.gpu_check.tasks.session import close
from moe_train.parallel.resolved import ResolvedRun


def train(overrides: list[str]) -> int:
    """``train.py`` with ``overrides`` on this process's one rank; returns its exit code."""
    from moe_train.run.main import main

    close()
    return main(overrides)


def plan(overrides: list[str], world: int) -> dict[str, Any]:
    """``plan.json`` of a configuration, as a run on this machine would write it."""
    from moe_train.planner.estimate import estimate

    run = _resolved(overrides, world)
    return estimate(run).report()


def _resolved(overrides: list[str], world: int) -> ResolvedRun:
    """The run of ``world`` ranks on this node, without having them here."""
    from moe_train.backend.cuda.devices import Devices, read_devices
    from moe_train.planner.machine.devices import Place, RankTable
    from moe_train.run.resolution import resolve_on_devices

    result = Devices() if "device=cpu" in overrides else read_devices()
    places = [Place(rank, world, rank, world) for rank in range(world)]
    tables = [RankTable(place, result.gpus, result.problem) for place in places]
    return resolve_on_devices(overrides, tables)


def weights(overrides: list[str]) -> dict[str, str]:
    """SHA-256 of every parameter's initial value, by name."""
    from moe_train.run.opening import open_session
    from moe_train.run.resolution import resolve_on_all_ranks

    close()
    run = resolve_on_all_ranks(overrides, 1)
    with ExitStack() as stack:
        session = open_session(run, 0, stack)
        return {
            name: digest(parameter.detach())
            for chunk in session.engine.chunks
            for name, parameter in chunk.named_parameters()
        }


def digest(tensor: Any) -> str:
    """SHA-256 of a tensor's bytes."""
    flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def dry_run(overrides: list[str], policies: list[str]) -> list[dict[str, Any]]:
    """``moe-train dryrun`` of one rank: its ``ranks`` entries, one a recompute policy."""
    from moe_train.commands.dryrun import dryrun_main

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "dryrun.json"
        arguments = ["--world", "1", "--device-like", "--json", str(path)]
        dryrun_main([*overrides, *arguments, "--recompute", ",".join(policies)])
        result: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["ranks"]
    return result


def fastest(overrides: list[str], world: int) -> dict[str, Any]:
    """The planner's fastest layout that fits, at the configuration's own global batch.

    Returns:
        ``tag`` and ``overrides`` of the layout.
    """
    from moe_train.parallel.sizes import legal_layouts
    from moe_train.planner.ranking import ranked

    run = _resolved(overrides, world)
    config, sequences = run.config, run.sequences
    config = replace(config, batch=replace(config.batch, global_=sequences))
    candidates = []
    for placement in ("stage", "span"):
        free = replace(
            config.parallel, tensor=None, pipeline=None, expert=None, placement=placement
        )
        candidates += legal_layouts(replace(config, parallel=free), world)
    best = ranked(config, candidates)[0]
    return {"tag": best.tag, "overrides": [*best.overrides(), f"batch.global={sequences}"]}
