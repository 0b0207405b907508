"""``moe-train generate``: continue prompts with a trained model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_train.commands.output import (
    add_json_option,
    command_parser,
    open_console,
    write_json_option,
)
from moe_train.errors import EXIT_FINISHED, ConfigError, MoeTrainError
from moe_train.inference.request import Sampling
from moe_train.inference.tasks import read_prompts
from moe_train.run.failure import report_error
from moe_train.run.generation import generate
from moe_train.run.logs import logging_to_console
from moe_train.run.torchelastic import world_of_process

EXAMPLES = """examples:
  moe-train generate runs/twin-TP2.PP4.EP8.span --prompt "def main(" --tokens 50
  moe-train generate runs/notes --prompts prompts.txt --temperature 0.8 --top-p 0.95 --seed 7
  moe-train generate exported/ --prompt "import" --greedy --json -
  torchrun --nproc-per-node 2 -m moe_train.cli generate runs/notes --prompt x parallel.tensor=2

A prompts file has one prompt a line; in a .jsonl file each line is {"prompt": "..."}.
Prompts of any length are computed together. A drawn token depends on the seed, the prompt's number
and the position, not on the layout. Ranks share the model by parallel.tensor, parallel.pipeline and
parallel.expert; weights of a spanning run load in any of these.
exit code: 0; 2 config, 3 data, 4 checkpoint, 7 memory
"""


def generate_main(argv: Sequence[str]) -> int:
    """Run ``moe-train generate`` on this rank; returns the exit code."""
    args = _parse(argv)
    with logging_to_console():
        try:
            result = generate(
                args.path,
                _prompts(args),
                args.overrides,
                tokens=args.tokens,
                sampling=Sampling(args.greedy, args.temperature, args.top_k, args.top_p, args.seed),
                cache=not args.no_cache,
                ignore_eod=args.ignore_eod,
                batch=args.batch,
            )
            if world_of_process()[0] == 0:
                _show(result, open_console(args))
                write_json_option(args, result)
            return EXIT_FINISHED
        except MoeTrainError as error:
            return report_error(error)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("generate", "Continue prompts with a trained model.", EXAMPLES)
    parser.add_argument("path", help="run folder, checkpoint or Hugging Face folder")
    parser.add_argument("overrides", nargs="*", help="config overrides, key=value")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given repeatedly")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt a line")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="new tokens (100)")
    parser.add_argument("--greedy", action="store_true", help="always the most likely token")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="1 by default")
    parser.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="keep the most likely share P")
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="of the draws (1234)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="prompts at once (8)")
    parser.add_argument("--no-cache", action="store_true", help="compute every token again")
    parser.add_argument("--ignore-eod", action="store_true", help="go on after a document's end")
    add_json_option(parser, "prompts, completions and margins")
    return parser.parse_intermixed_args(argv)


def _prompts(args: argparse.Namespace) -> list[str]:
    if (args.prompt is None) == (args.prompts is None):
        raise ConfigError("prompt", "needs one of --prompt and --prompts", "--prompt TEXT")
    prompts: list[str] = args.prompt or read_prompts(Path(args.prompts))
    return prompts


def _show(result: Mapping[str, Any], console: Console) -> None:
    for one in result["completions"]:
        console.print(f"{one['prompt']}{one['text']}", markup=False, highlight=False)
        console.print("-" * 40)
    tokens = sum(len(one["tokens"]) for one in result["completions"])
    console.print(
        f"{tokens} tokens in {result['seconds']:.1f} s by {result['checkpoint']} in layout "
        f"{result['layout']} on {result['world']} rank(s)",
        markup=False,
        highlight=False,
    )
    sys.stdout.flush()
