"""A run from overrides to exit code: plan, open, build, resume, train, close."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from moe_train.config.compose import expand_multirun
from moe_train.config.convert import to_mapping
from moe_train.errors import EXIT_FINISHED, MoeTrainError
from moe_train.monitor.files import write_atomically
from moe_train.monitor.rank_log import log_to_file
from moe_train.monitor.run_folder import RunFolder, create_run_folder, default_run_name
from moe_train.monitor.status import write_status
from moe_train.plan.machine import visible_devices
from moe_train.plan.prepare import prepare
from moe_train.plan.report import plan_report

if TYPE_CHECKING:
    from moe_train.config.root import Config
    from moe_train.plan.layout import Layout

MULTIRUN = ("-m", "--multirun")


def world_of_process() -> tuple[int, int]:
    """Rank and world size from torchrun's environment; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def main(argv: Sequence[str]) -> int:
    """Train with Hydra overrides; ``-m a=1,2`` runs every combination in turn.

    Returns:
        The rank's exit code; the first failed job's, for several.
    """
    multirun = any(word in MULTIRUN for word in argv)
    overrides = [word for word in argv if word not in MULTIRUN]
    try:
        jobs = expand_multirun(overrides) if multirun else [overrides]
    except MoeTrainError as fault:
        return report(fault)
    codes = [run(job) for job in jobs]
    return next((code for code in codes if code != EXIT_FINISHED), EXIT_FINISHED)


def report(fault: MoeTrainError) -> int:
    """Tell an error once, from rank 0, and return its exit code."""
    if world_of_process()[0] == 0:
        print(f"moe_train: {fault}", file=sys.stderr, flush=True)
    return fault.exit_code


def planned(overrides: Sequence[str], world: int) -> tuple[Config, Layout]:
    """Config and layout of a run on this machine, every fault found before torch is imported.

    Raises:
        ConfigFaults: all faults together.
    """
    on_cpu = "device=cpu" in overrides
    return prepare(overrides, world, None if on_cpu else visible_devices(world))


def run(overrides: Sequence[str]) -> int:
    """One run on this rank; returns its exit code."""
    begun = time.perf_counter()
    rank, world = world_of_process()
    folder: RunFolder | None = None
    reached = [0]
    try:
        config, layout = planned(overrides, world)
        if rank == 0:
            folder = open_folder(config, layout)
            announce(config, layout, world)
        from moe_train.session import train_session

        with ExitStack() as stack:
            train_session(config, layout, rank, world, folder, stack, begun, reached)
        return EXIT_FINISHED
    except MoeTrainError as fault:
        if folder is not None:
            state = "preempted" if fault.exit_code == 75 else "failed"
            write_status(folder.status, state, reached[0], str(fault))
        return report(fault)
    except BaseException as crash:
        if folder is not None:
            write_status(folder.status, "failed", reached[0], f"{type(crash).__name__}: {crash}")
        raise
    finally:
        log_to_file(None)


def open_folder(config: Config, layout: Layout) -> RunFolder:
    """Create or take up the run folder, and write config and plan into it (rank 0).

    Raises:
        ConfigError: the folder cannot be written.
    """
    folder = create_run_folder(
        config.run.dir,
        config.run.name,
        default_name=default_run_name(config.experiment, layout.tag),
        fresh=config.checkpoint.resume == "never",
    )
    config.run.name = folder.path.name
    folder.write_config(to_mapping(config))
    write_atomically(folder.plan, json.dumps(plan_report(config, layout), indent=1) + "\n")
    write_status(folder.status, "running", 0)
    return folder


def announce(config: Config, layout: Layout, world: int) -> None:
    """Say what is about to run, and why (rank 0)."""
    why = f" ({config.experiment_reason})" if config.experiment_reason else ""
    print(f"experiment {config.experiment}{why}")
    print(
        f"layout {layout.tag} on {world} rank(s): tensor {layout.tensor}, pipeline "
        f"{layout.pipeline}, expert {layout.expert}, data {layout.data}, "
        f"placement {layout.placement}",
        flush=True,
    )
