"""``moe-train dryrun``: a rank's real step at full size, on fake tensors, before launch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from moe_train.commands.common import check_imbalance
from moe_train.errors import EXIT_FINISHED, ConfigError, ConfigFaults
from moe_train.parallel.layout import Layout

EXAMPLES = """examples:
  moe-train dryrun experiment=moe_30b_8x64gb               one rank of each stage of the 30 B
  moe-train dryrun experiment=moe_30b_8x64gb --ranks 3     rank 3 alone
  moe-train dryrun experiment=moe_30b_8x64gb --ranks all --json dryrun.json
  moe-train dryrun experiment=moe_30b_32x64gb --recompute none,2-15,all --microbatches 8
  moe-train dryrun experiment=moe_30b_8x64gb parallel.placement=stage parallel.expert=2 \\
      --imbalance 1.5
  moe-train dryrun --table docs/dryrun.md                  every layout of the 30 B: a long run

The model, the optimizer with its state and the schedule are the real ones, with this machine's
kernels (torch's own); tensors hold no memory. The step includes gradient norm, clipping and
update. Tokens are routed evenly; --imbalance scales the rows of the rank's experts.

exit code: 0; 2 the configuration is refused
"""

BLOCK = 512
"""Bytes to which the caching allocator of an accelerator rounds up."""


def dryrun_main(argv: Sequence[str]) -> int:
    """Run ``moe-train dryrun``; returns the exit code.

    Raises:
        ConfigFaults: the plan is refused.
    """
    args = _parser().parse_intermixed_args(argv)
    check_imbalance(args.imbalance)
    if args.microbatches is not None and args.microbatches < 1:
        raise ConfigError("--microbatches", "a step has at least one", "give 1 or more")

    from rich.console import Console

    from moe_train.commands.common import plan_world, refuse_unwritable, write_text

    refuse_unwritable("--json", args.json)

    from moe_train.config.compose import collect
    from moe_train.planner.plan_only import plan_only
    from moe_train.planner.resolution import resolve_run

    config, faults = collect(args.overrides)
    world = plan_world(args.world, None if faults else config)
    policies = args.recompute.split(",") if args.recompute else [None]
    plans = [
        resolve_run([*args.overrides, *([f"recompute.layers={one}"] if one else [])], world)
        for one in policies
    ]
    from moe_train.measure.dryrun.prepare import cpu_backend, first_of_stages
    from moe_train.measure.dryrun.report import (
        VERSION,
        planned,
        print_modules,
        print_stages,
        rank_report,
    )

    layout = plans[0].layout
    if refused := plan_only(plans[0].config):
        raise ConfigFaults(refused)
    if plans[0].config.parallel.overlap_expert_comm:
        raise ConfigError(
            "parallel.overlap_expert_comm",
            "the dry run follows one pass at a time, and overlap runs two side by side",
            "false: the plain schedule's memory",
        )
    ranks = _ranks(args.ranks, layout) if args.ranks else first_of_stages(layout)
    # Megatron's modules come only after the host is prepared for them.
    backend = cpu_backend(plans[0].config)

    from moe_train.measure.dryrun.rank import dry_run

    rows = []
    for resolved in plans:
        for rank in ranks:
            run = dry_run(
                resolved,
                backend,
                rank,
                imbalance=args.imbalance,
                microbatches=args.microbatches,
                block=BLOCK if args.device_like else 1,
            )
            plan = planned(resolved, run.stage, args.imbalance)
            rows.append((resolved.config.recompute.layers, run, plan))
    console = Console()
    print_stages(rows, console)
    for recompute in dict.fromkeys(row[0] for row in rows):
        most = max((row[1] for row in rows if row[0] == recompute), key=lambda run: run.peak.bytes)
        print_modules(most, recompute, console)
    if args.json:
        report = {
            "version": VERSION,
            "layout": layout.tag,
            "world": world,
            "imbalance": args.imbalance,
            "block_bytes": BLOCK if args.device_like else 1,
            "ranks": [rank_report(run, plan, recompute) for recompute, run, plan in rows],
        }
        write_text("--json", args.json, json.dumps(report, indent=1) + "\n")
    return EXIT_FINISHED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-train dryrun",
        description="Build a rank's real model and run its step on fake tensors; show the peak.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("overrides", nargs="*", help="config overrides, key=value")
    add("--world", type=int, help="ranks (default: what the layout needs, or 8)")
    add("--ranks", metavar="all|K|K,L", help="ranks to be (default: the first of each stage)")
    add("--recompute", metavar="A,B", help="compare values of recompute.layers: none,2-15,all")
    add("--imbalance", type=float, default=1.0, metavar="X",
        help="rows of the rank's experts over the average (default 1)")  # fmt: skip
    add("--microbatches", type=int, metavar="M", help="of the step (default: as configured)")
    add("--device-like", action="store_true",
        help=f"count allocations in blocks of {BLOCK} bytes, as a GPU does")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def _ranks(args: str, layout: Layout) -> list[int]:
    if args == "all":
        return list(range(layout.world))
    overrides = args.split(",")
    if not all(word.isdecimal() and int(word) < layout.world for word in overrides):
        last = layout.world - 1
        raise ConfigError(
            "--ranks", f"{args!r} names no ranks", f"all, or numbers from 0 to {last}"
        )
    return [int(word) for word in overrides]
