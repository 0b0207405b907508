"""``moe-train evaluate``: loss, perplexity and choices of a model, in any layout, weights only."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from moe_train.commands.output import (
    add_json_option,
    command_parser,
    open_console,
    write_json_option,
)
from moe_train.errors import EXIT_FINISHED, MoeTrainError
from moe_train.run.evaluation import evaluate
from moe_train.run.failure import report_error
from moe_train.run.logs import logging_to_console
from moe_train.run.torchelastic import world_of_process

EXAMPLES = """examples:
  moe-train evaluate runs/twin-TP2.PP4.EP8.span
  moe-train evaluate runs/x/checkpoints/step_00000100 --json loss.json
  moe-train evaluate runs/notes data.valid=[data/held_out] train.eval_batches=20
  moe-train evaluate exported/ --text book.txt
  moe-train evaluate runs/notes --domains held_out.jsonl
  moe-train evaluate runs/notes --choices questions.jsonl
  torchrun --nproc-per-node 4 -m moe_train.cli evaluate runs/notes parallel.expert=4

lines of the jsonl files:
  --domains   {"domain": "code", "text": "def f(): ..."}
  --choices   {"context": "2 + 2 =", "choices": ["3", "4"], "answer": 1}

Model, data and batch are those of PATH, unless overridden; the layout is chosen for the ranks that
there are. A text is cut into windows of data.sequence tokens. Choices are scored as
lm-evaluation-harness does: acc by log-likelihood, acc_norm by log-likelihood per character.
exit code: 0; 2 config, 3 data, 4 checkpoint, 7 memory
"""


def evaluate_main(argv: Sequence[str]) -> int:
    """Run ``moe-train evaluate`` on this rank; returns the exit code."""
    parser = command_parser(
        "evaluate",
        "Loss (nats per token) and perplexity on the validation data of a run, or on a file.",
        EXAMPLES,
    )
    parser.add_argument("path", help="run folder, checkpoint or Hugging Face folder")
    parser.add_argument("overrides", nargs="*", help="config overrides, key=value")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--text", metavar="FILE", help="score a text")
    files.add_argument(
        "--domains", metavar="FILE", help="score the texts of a jsonl file by domain"
    )
    files.add_argument("--choices", metavar="FILE", help="answer the questions of a jsonl file")
    add_json_option(parser, "the result")
    args = parser.parse_intermixed_args(argv)
    with logging_to_console():
        try:
            result = evaluate(
                args.path,
                args.overrides,
                text=args.text,
                domains=args.domains,
                choices=args.choices,
            )
            if world_of_process()[0] == 0:
                _show(result, open_console(args))
                write_json_option(args, result)
            return EXIT_FINISHED
        except MoeTrainError as error:
            return report_error(error)


def _show(result: Mapping[str, Any], console: Console) -> None:
    loss, perplexity = result["loss"], result["perplexity"]
    step = "" if result["step"] is None else f" (step {result['step']})"
    rows = [
        ("checkpoint", f"{result['checkpoint']}{step}"),
        ("layout", f"{result['layout']} on {result['world']} rank(s)"),
        ("tokens", f"{result['tokens']:,}"),
        ("loss", f"{loss:.4f} nats per token"),
        ("perplexity", f"{perplexity:,.2f}" if perplexity is not None else "beyond e^700"),
    ]
    if (entropy := result.get("unigram_entropy")) is not None:
        below = "loss below" if loss < entropy else "not below"
        rows.append(("unigram entropy", f"{entropy:.4f} ({below})"))
    for name, part in result.get("domains", {}).items():
        rows.append((name, f"{part['loss']:.4f} nats per token, {part['tokens']:,} tokens"))
    if "acc" in result:
        rows.append(("questions", f"{result['questions']:,}"))
        for name in ("acc", "acc_norm"):
            error = result[f"{name}_stderr"]
            rows.append(
                (name, f"{result[name]:.4f}" + ("" if error is None else f" ± {error:.4f}"))
            )
    for label, value in rows:
        console.print(f"{label:<16}{value}", markup=False, highlight=False)
    sys.stdout.flush()
