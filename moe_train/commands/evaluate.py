"""``moe-train evaluate``: loss and perplexity of a checkpoint, in any layout, weights only."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_train.errors import EXIT_FINISHED, ConfigError, MoeTrainError
from moe_train.files import write_atomically
from moe_train.run.evaluation import evaluate
from moe_train.run.failure import report_error
from moe_train.run.logs import logging_to_console
from moe_train.run.torchelastic import world_of_process

EXAMPLES = """examples:
  moe-train evaluate run.name=twin-TP2.PP4.EP8.span
  moe-train evaluate checkpoint.resume=runs/x/checkpoints/step_00000100 --json loss.json
  moe-train evaluate run.name=notes data.valid=[data/held_out] train.eval_batches=20
  torchrun --nproc-per-node 4 -m moe_train.cli evaluate run.name=notes parallel.expert=4

Model, data and batch are those of the checkpoint's run, unless overridden; the layout is chosen
for the ranks that there are. exit code: 0; 2 config, 3 data, 4 checkpoint, 7 memory
"""


def evaluate_main(argv: Sequence[str]) -> int:
    """Run ``moe-train evaluate`` on this rank; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="moe-train evaluate",
        description="Loss (nats per token) and perplexity of a checkpoint on validation data.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="config overrides, key=value")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    args = parser.parse_intermixed_args(argv)
    with logging_to_console():
        try:
            result = evaluate(args.overrides)
            if world_of_process()[0] == 0:
                _show(result, args.json)
            return EXIT_FINISHED
        except MoeTrainError as error:
            return report_error(error)


def _show(result: Mapping[str, Any], target: Path | None) -> None:
    """Print the result, and write it to ``target``.

    Raises:
        ConfigError: ``target`` cannot be written.
    """
    entropy, loss = result["unigram_entropy"], result["loss"]
    rows = [
        ("checkpoint", f"{result['checkpoint']} (step {result['step']})"),
        ("layout", f"{result['layout']} on {result['world']} rank(s)"),
        ("tokens", f"{result['tokens']:,}"),
        ("loss", f"{loss:.4f} nats per token"),
        ("perplexity", f"{math.exp(loss):,.2f}" if loss < 700 else "beyond e^700"),
        ("unigram entropy", f"{entropy:.4f} ({'loss below' if loss < entropy else 'not below'})"),
    ]
    for label, value in rows:
        print(f"{label:<16}{value}")
    sys.stdout.flush()
    if target is not None:
        try:
            write_atomically(target, json.dumps(dict(result), indent=1) + "\n")
        except OSError as error:
            raise ConfigError("--json", str(error), "give a writable file") from error
