"""``moe-train plan``: legality, layout, memory and step time of a run, before it starts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from moe_train.commands.common import check_imbalance, console_for, plan_world, write_text
from moe_train.config.root import AUTO
from moe_train.errors import EXIT_FINISHED, ConfigError

EXAMPLES = """examples:
  moe-train plan                                  the default run on 8 ranks
  moe-train plan experiment=moe_30b_32x64gb       30 B on 32 devices
  moe-train plan parallel.expert=8 --world 16     another layout
  moe-train plan experiment=moe_30b_8x64gb --full
  moe-train plan experiment=moe_30b_8x64gb --json plan.json
  moe-train plan experiment=moe_30b_8x64gb hardware=h100_64gb --imbalance 1.3
  moe-train plan experiment=moe_30b_8x64gb --claims source_document --report claims.md
  moe-train plan --calibrate                      measure this machine; --calibrate --help

exit code: 0 legal and fits; 2 refused, with every fault and the nearest legal layouts, or with
what would make it fit the device's memory
"""


def plan_main(argv: Sequence[str]) -> int:
    """Run ``moe-train plan``; returns the exit code.

    Raises:
        ConfigFaults: the plan is refused.
    """
    parser = argparse.ArgumentParser(
        prog="moe-train plan",
        description="Check a layout: is it legal, does it fit, how fast is it, is another better?",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="config overrides, key=value")
    parser.add_argument(
        "--world",
        type=int,
        help="ranks (default: what the layout needs, this machine's GPUs, or 8)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the whole plan there; - is stdout"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="print the tables: layers, ranks, groups, memory, traffic, times",
    )
    parser.add_argument(
        "--imbalance",
        type=float,
        metavar="X",
        help="rows of the busiest rank's experts over the average (default 1, and 1.3 for an "
        "accelerator's memory)",
    )
    parser.add_argument(
        "--fragmentation",
        type=float,
        metavar="X",
        help="share of all tensors that the allocator wastes (default 0.02)",
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
    args = parser.parse_intermixed_args(argv)

    from moe_train.backend.cuda.devices import read_devices
    from moe_train.config.compose import collect, override_keys, recompute_source
    from moe_train.parallel.sizes import DEFAULT_WORLD
    from moe_train.planner.estimate import estimate
    from moe_train.planner.machine.devices import local_facts
    from moe_train.planner.plan import FRAGMENTATION, assumptions_of
    from moe_train.planner.report.better import short_search
    from moe_train.planner.report.screen import print_screen, print_warnings
    from moe_train.planner.report.tables import print_plan
    from moe_train.planner.report.warnings import plan_warnings
    from moe_train.planner.resolution import resolve_run

    imbalance = 1.0 if args.imbalance is None else args.imbalance
    check_imbalance(imbalance)
    if args.fragmentation is None:
        args.fragmentation = FRAGMENTATION
    if not 0 <= args.fragmentation < 1:
        raise ConfigError(
            "--fragmentation", f"{args.fragmentation:g} is not a share", "from 0 to below 1"
        )
    if args.claims is not None:
        return _claims(args, imbalance)
    if args.report:
        raise ConfigError("--report", "needs --claims", "add --claims FILE")
    console = console_for(args.json)
    config, faults = collect(args.overrides)
    here, problems = None, []
    named = "hardware" in override_keys(args.overrides)
    if config.experiment == AUTO and config.device != "cpu" and not named:
        here = read_devices()
        if here.problem:
            problems = [f"{'' if here.gpus else 'planned for a CPU: '}{here.problem}"]
    world = plan_world(args.world, None if faults else config)
    if args.world is None and here and here.gpus and world == DEFAULT_WORLD:
        # What `make train` would start here.
        world = min(world, len(here.gpus))
    facts = local_facts(here, world) if here else None
    run = resolve_run(args.overrides, world, facts, (config, faults))
    taken = assumptions_of(run.config, imbalance, args.fragmentation, args.imbalance)
    plan = estimate(run, taken)
    report = {**plan.report(), "better": short_search(plan)}
    report["recompute"]["source"] = recompute_source(run.config, args.overrides)
    warnings = [*problems, *plan_warnings(plan)]
    print_screen(report, warnings, console)
    if args.full:
        print_plan(report, console)
        print_warnings(warnings, console)
    if args.json:
        write_text("--json", args.json, json.dumps(report, indent=1) + "\n")
    if (fault := plan.memory_fault) and run.config.hardware.kind == "accelerator":
        raise fault
    return EXIT_FINISHED


def _claims(args: argparse.Namespace, imbalance: float) -> int:
    from moe_train.config.compose import compose
    from moe_train.parallel.shapes import Assumptions
    from moe_train.planner.claims.document import find, load
    from moe_train.planner.claims.report import check_claims

    document = load(find(args.claims))
    config = compose([*document.overrides, *args.overrides]) if args.world is None else None
    world = plan_world(args.world, config)
    assumptions = Assumptions(imbalance, args.fragmentation)
    console = console_for(args.json)
    markdown, data = check_claims(
        document, args.overrides, world, assumptions, console, full=args.full
    )
    if args.report:
        write_text("--report", args.report, markdown)
    if args.json:
        write_text("--json", args.json, data)
    return EXIT_FINISHED
