"""``moe-train plan``: is it legal, and who holds what; in under two seconds, no torch."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from moe_train.config.experiment import AUTO
from moe_train.config.root import Config
from moe_train.errors import EXIT_FINISHED, ConfigError

EXAMPLES = """examples:
  moe-train plan                                  the default run on 8 ranks
  moe-train plan experiment=moe_30b_32x64gb       30 B on 32 devices
  moe-train plan parallel.expert=8 --world 16     another layout
  moe-train plan experiment=moe_30b_8x64gb --json plan.json

exit code: 0 legal; 2 refused, with every fault and the nearest legal layouts
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
        description="Check a layout and show where layers, experts and parameters live.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="config overrides, key=value")
    parser.add_argument("--world", type=int, help="ranks (default: what the layout needs, or 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole plan there")
    asked = parser.parse_intermixed_args(argv)

    from rich.console import Console

    from moe_train.config.compose import collect
    from moe_train.plan.machine import visible_devices
    from moe_train.plan.prepare import prepare
    from moe_train.plan.report import plan_report
    from moe_train.plan.tables import print_plan

    world = asked.world
    config, faults = collect(asked.overrides)
    if world is None:
        world = natural_world(config) if not faults else DEFAULT_WORLD
    if world < 1:
        raise ConfigError("--world", f"{world} is no number of ranks", "give 1 or more")
    facts = None
    if config.experiment == AUTO and config.device != "cpu":
        facts = visible_devices(world)
    config, layout = prepare(asked.overrides, world, facts)
    report = plan_report(config, layout)
    print_plan(report, Console())
    if asked.json:
        try:
            asked.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError("--json", str(error), "give a writable file") from error
    return EXIT_FINISHED
