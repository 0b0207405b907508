"""``moe-train tune``: the fastest layouts that fit, and what separates them."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.commands.common import (
    check_imbalance,
    console_for,
    plan_world,
    refuse_unwritable,
    write_text,
)
from moe_train.commands.output import command_parser
from moe_train.config.root import AUTO
from moe_train.errors import EXIT_FINISHED, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from moe_train.planner.search import Candidate
    from moe_train.planner.search.tuning import Tuning

POOL = 24
"""Layouts from which ``--measure`` chooses."""
EXAMPLES = """examples:
  moe-train tune experiment=moe_30b_8x64gb                 the 30 B on 8 devices of 64 GB
  moe-train tune experiment=moe_30b_8x64gb hardware=h100_80gb --world 16
  moe-train tune experiment=moe_30b_8x64gb parallel.tensor=2 batch.micro=1
                                                           these two stay as they are
  moe-train tune experiment=moe_30b_8x64gb --top 10 --json tune.json
  moe-train tune experiment=moe_30b_8x64gb --prove 2       memory of the first two on fake tensors
  moe-train tune experiment=twin --world 4 --measure 3     train three of them here: minutes

Searched: tensor, pipeline, virtual-pipeline, context, expert and expert-tensor sizes, placement,
micro-batch, recomputation, expert overlap, dispatcher and optimizer sharding, at the tokens of the
step that the overrides compose. A key that is set by itself (parallel.tensor=2) is fixed; a group
(experiment=, parallel=, recompute=) says where the search starts.

--measure starts short runs as make train does. The first choice runs first; each run refits the
times and decides what runs next; then all run again in turn, and medians decide.

exit code: 0; 2 an override is refused, or no layout is legal
"""


def tune_main(argv: Sequence[str]) -> int:
    """Run ``moe-train tune``; returns the exit code.

    Raises:
        ConfigFaults: an override is refused.
        ConfigError: no layout is legal.
    """
    args = _parser().parse_intermixed_args(argv)

    from moe_train.backend.cuda.devices import read_devices
    from moe_train.config.compose import collect, override_keys
    from moe_train.planner.machine.devices import local_facts
    from moe_train.planner.report.tune_tables import print_tuning
    from moe_train.planner.search.tuning import tune

    if args.imbalance is not None:
        check_imbalance(args.imbalance)
    for option, least in (("top", 1), ("prove", 0), ("measure", 0)):
        if getattr(args, option) < least:
            raise ConfigError(
                f"--{option}", f"{getattr(args, option)} is too few", f"{least} or more"
            )
    refuse_unwritable("--json", args.json)
    console = console_for(args.json)
    config, faults = collect(args.overrides)
    named = "hardware" in override_keys(args.overrides)
    here = None
    if config.experiment == AUTO and config.device != "cpu" and not named:
        here = read_devices()
    world = plan_world(args.world, None if faults else config)
    facts = local_facts(here, world) if here else None
    tuning = tune(
        args.overrides,
        world,
        count=max(args.top, args.prove, POOL if args.measure else 0),
        imbalance=args.imbalance,
        facts=facts,
    )
    report = tuning.report(args.top)
    print_tuning(report, console)
    if args.prove:
        report["proofs"] = _prove(tuning, args.prove, console)
    if args.measure:
        report["measured"] = _measure(tuning, args.measure, args.overrides, console)
    if args.json:
        write_text("--json", args.json, json.dumps(report, indent=1) + "\n")
    return EXIT_FINISHED


def _prove(tuning: Tuning, count: int, console: Console) -> list[dict[str, Any]]:
    from moe_train.measure.prove import prove
    from moe_train.planner.report.tune_tables import print_proofs

    imbalance = tuning.top[0].plan.assumptions.imbalance
    proofs = [one.report() for one in prove(tuning.top[:count], imbalance)]
    print_proofs(proofs, console)
    return proofs


def _measure(
    tuning: Tuning, count: int, overrides: Sequence[str], console: Console
) -> dict[str, Any]:
    from moe_train.measure.trials import launched, measure, trials_report
    from moe_train.planner.report.tune_tables import print_trials

    def lines(candidate: Candidate) -> list[str]:
        return candidate.overrides(tuning.base)

    pool = [one for one in tuning.top if one.fits]
    if not pool:
        raise ConfigError("--measure", "nothing fits, so nothing can run", "see what would fit")
    with tempfile.TemporaryDirectory(prefix="moe_train_tune_") as folder:
        trials = measure(pool, count, Path(folder), launched(overrides, lines))
    report = trials_report(trials, pool, lines)
    print_trials(report, console)
    return report


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "tune", "Search all legal layouts and options for the fastest that fit.", EXAMPLES
    )
    add = parser.add_argument
    add("overrides", nargs="*", help="config overrides, key=value")
    add("--world", type=int, help="ranks (default: what the layout needs, or 8)")
    add("--top", type=int, default=5, metavar="K", help="layouts to show (default 5)")
    add("--imbalance", type=float, metavar="X",
        help="rows of the busiest rank's experts over the average")  # fmt: skip
    add("--prove", type=int, default=0, metavar="K",
        help="run the first K on fake tensors: peaks beside predictions")  # fmt: skip
    add("--measure", type=int, default=0, metavar="K",
        help="train K of them here for some steps, refit, choose the fastest")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all figures there; - is stdout")
    return parser
