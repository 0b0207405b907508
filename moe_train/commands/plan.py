"""``moe-train plan``: legal or not, who holds what, memory, time; in two seconds, no torch."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from math import inf
from pathlib import Path

from moe_train.config.root import AUTO, Config
from moe_train.errors import EXIT_FINISHED, ConfigError

EXAMPLES = """examples:
  moe-train plan                                  the default run on 8 ranks
  moe-train plan experiment=moe_30b_32x64gb       30 B on 32 devices
  moe-train plan parallel.expert=8 --world 16     another layout
  moe-train plan experiment=moe_30b_8x64gb --json plan.json
  moe-train plan experiment=moe_30b_8x64gb hardware=h100_64gb --imbalance 1.3
  moe-train plan experiment=moe_30b_8x64gb --claims source_document --report claims.md
  moe-train plan --calibrate                      measure this machine; --calibrate --help

exit code: 0 legal and fits; 2 refused, with every fault and the nearest legal layouts, or with
what would make it fit the device's memory
"""

DEFAULT_WORLD = 8


def natural_world(config: Config) -> int:
    """Ranks to plan for when none are given: what the set sizes need, or 8 for auto."""
    sizes = config.parallel
    stages = sizes.pipeline or 1
    dense = (sizes.tensor or 1) * (sizes.context or 1) * stages
    expert = (sizes.expert or 1) * (1 if sizes.placement == "span" else stages)
    needed = math.lcm(dense, expert * (sizes.expert_tensor or 1))
    return math.lcm(needed, DEFAULT_WORLD) if sizes.auto else needed


def plan_main(argv: Sequence[str]) -> int:
    """Run ``moe-train plan``; returns the exit code.

    Raises:
        ConfigFaults: the plan is refused.
    """
    parser = argparse.ArgumentParser(
        prog="moe-train plan",
        description="Check a layout; show where everything lives, what it needs, how fast it is.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="config overrides, key=value")
    parser.add_argument(
        "--world",
        type=int,
        help="ranks (default: what the layout needs, this machine's GPUs, or 8)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole plan there")
    parser.add_argument(
        "--imbalance",
        type=float,
        default=1.0,
        metavar="X",
        help="rows of the busiest rank's experts over the average (default 1)",
    )
    parser.add_argument(
        "--fragmentation",
        type=float,
        default=0.05,
        metavar="X",
        help="share of activations that the allocator wastes (default 0.05)",
    )
    parser.add_argument(
        "--claims",
        metavar="FILE",
        help="check the claims of FILE, or of a shipped set by name",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="with --claims: write Markdown there",
    )
    asked = parser.parse_intermixed_args(argv)

    from rich.console import Console

    from moe_train.backend.cuda.devices import read_devices
    from moe_train.config.compose import collect
    from moe_train.parallel.vocabulary import vocabulary
    from moe_train.planner.machine.devices import local_facts
    from moe_train.planner.memory.fit import assumptions_of, memory_fault
    from moe_train.planner.report.plan_report import plan_report
    from moe_train.planner.report.tables import print_plan
    from moe_train.planner.resolution import dtype_faults, resolve_run

    if not (1 <= asked.imbalance < inf and 0 <= asked.fragmentation < 1):
        raise ConfigError(
            "--imbalance, --fragmentation",
            f"{asked.imbalance:g}, {asked.fragmentation:g} make no sense",
            "an imbalance from 1 up, a fragmentation from 0 to below 1",
        )
    if asked.claims is not None:
        return _claims(asked)
    if asked.report:
        raise ConfigError("--report", "is the report on claims", "add --claims FILE")
    world = asked.world
    console = Console()
    config, faults = collect(asked.overrides)
    here = None
    if config.experiment == AUTO and config.device != "cpu":
        here = read_devices()
        if here.problem:
            planned_for = "" if here.gpus else "planned for a CPU: "
            console.print(f"[bold]warning[/bold] {planned_for}{here.problem}", markup=True)
    if world is None:
        world = natural_world(config) if not faults else DEFAULT_WORLD
        if here and here.gpus and world == DEFAULT_WORLD:
            # What `make train` would start here.
            world = min(world, len(here.gpus))
    if world < 1:
        raise ConfigError("--world", f"{world} is no number of ranks", "give 1 or more")
    facts = local_facts(here, world) if here is not None else None
    run = resolve_run(asked.overrides, world, facts)
    config, layout = run.config, run.layout
    if unfit := dtype_faults(config):
        raise unfit[0]
    assumptions = assumptions_of(config, asked.imbalance, asked.fragmentation)
    report = plan_report(config, layout, assumptions)
    fault = memory_fault(config, layout, vocabulary(config)[0], assumptions)
    report["fits"] = fault is None
    print_plan(report, console)
    if asked.json:
        write_text("--json", asked.json, json.dumps(report, indent=1) + "\n")
    if fault is not None:
        if config.hardware.kind == "accelerator":
            raise fault
        console.print(f"[bold]warning[/bold] {fault}")
    return EXIT_FINISHED


def _claims(asked: argparse.Namespace) -> int:
    from rich.console import Console

    from moe_train.commands.claims import check_claims
    from moe_train.config.compose import compose
    from moe_train.parallel.shapes import Assumptions
    from moe_train.planner.claims.document import find, load

    document = load(find(asked.claims))
    words = [*document.overrides, *asked.overrides]
    world = natural_world(compose(words)) if asked.world is None else asked.world
    if world < 1:
        raise ConfigError("--world", f"{world} is no number of ranks", "give 1 or more")
    taken = Assumptions(asked.imbalance, asked.fragmentation)
    markdown, data = check_claims(document, asked.overrides, world, taken, Console())
    if asked.report:
        write_text("--report", asked.report, markdown)
    if asked.json:
        write_text("--json", asked.json, data)
    return EXIT_FINISHED


def refuse_unwritable(option: str, path: Path | None) -> None:
    """Look, before minutes of work, at whether `option`'s file could be written.

    Raises:
        ConfigError: it could not.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(option, f"{path} is no place for a file", "give a writable file")


def write_text(option: str, path: Path, text: str) -> None:
    """Write a report that `option` asked for, and say so.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(option, str(error), "give a writable file") from error
    print(f"written to {path}")
