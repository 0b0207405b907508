"""``moe-train data prepare`` and ``moe-train data inspect``."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moe_train.commands.output import (
    add_json_option,
    command_parser,
    open_console,
    write_json_option,
)
from moe_train.errors import EXIT_FINISHED

if TYPE_CHECKING:
    from moe_train.data import prepare as preparation

LINE_SECONDS = 5.0

PREPARE_EXAMPLES = """examples:
  moe-train data prepare notes/ --output data/notes
  moe-train data prepare a.jsonl b.jsonl.zst --output data/web --tokenizer bpe:32000 --workers 8
  moe-train data prepare wiki.parquet --text-key body --output data/wiki \\
      --tokenizer tokenizer.json --eod '</s>' --json report.json

A killed preparation is continued by the same command. Train on the result with
  python train.py data.train=[data/web]
"""

INSPECT_EXAMPLES = """examples:
  moe-train data inspect data/web --samples 3
  moe-train data inspect data/web --verify --json -      report on standard output
"""


def prepare_main(argv: Sequence[str]) -> int:
    """Run ``data prepare``; returns the exit code.

    Raises:
        DataError: bad input, or an output that exists or cannot be written.
    """
    parser = command_parser(
        "data prepare", "Turn text into a dataset to train on.", PREPARE_EXAMPLES
    )
    add = parser.add_argument
    add("sources", nargs="+", type=Path, help="files (text, .jsonl, .gz, .zst, .parquet), folders")
    add("--output", required=True, type=Path, metavar="PREFIX", help="writes PREFIX.bin, .idx, ...")
    add("--tokenizer", default="byte", help="byte (default), bpe:VOCAB, or a tokenizer.json file")
    add("--eod", metavar="TOKEN", help="name of the tokenizer's end-of-document token")
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with that token (default)",
    )
    add("--text-key", default="text", metavar="KEY", help="jsonl key or parquet column (text)")
    add("--workers", type=_at_least(1), default=1, metavar="N", help="processes (1)")
    add("--overwrite", action="store_true", help="replace files at PREFIX")
    add_json_option(parser, "the manifest")
    args = parser.parse_args(argv)
    with warnings.catch_warnings():
        # Megatron warns of missing GPU libraries, which no preparation needs.
        warnings.simplefilter("ignore")
        from moe_train.data.prepare import Request, prepare
    request = Request(
        sources=tuple(args.sources),
        output=args.output,
        tokenizer=args.tokenizer,
        eod_name=args.eod,
        append_eod=args.append_eod,
        text_key=args.text_key,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    try:
        with PrepareProgress() as progress:
            manifest = asdict(prepare(request, progress.report))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command continues from here\n")
        raise
    write_json_option(args, manifest)
    shown = ("documents", "skipped_documents", "tokens", "vocab_size", "dtype", "unigram_entropy")
    _print(open_console(args), {"prefix": str(args.output)} | {key: manifest[key] for key in shown})
    return EXIT_FINISHED


def inspect_main(argv: Sequence[str]) -> int:
    """Run ``data inspect``; returns the exit code.

    Raises:
        DataError: missing, truncated or changed files, or another tokenizer.
    """
    parser = command_parser("data inspect", "Show what a prepared dataset holds.", INSPECT_EXAMPLES)
    add = parser.add_argument
    add("prefix", type=Path, help="the dataset's PREFIX")
    add(
        "--samples",
        type=_at_least(0),
        default=0,
        metavar="K",
        help="decode the start of K documents",
    )
    add("--tokenizer", help="for data without a manifest: byte or a tokenizer.json file")
    add("--verify", action="store_true", help="compare the files' sha256 with the manifest")
    add_json_option(parser, "the report")
    args = parser.parse_args(argv)

    from moe_train.data.statistics import inspect

    report = inspect(args.prefix, args.samples, args.tokenizer, args.verify)
    write_json_option(args, report)
    console = open_console(args)
    samples = report.pop("samples", [])
    _print(console, report)
    for sample in samples:
        title = f"document {sample['sequence']}, {sample['tokens']} tokens: {sample['ids']}"
        for line in ("", f"--- {title}", sample["text"]):
            if line is not None:
                console.print(line, markup=False, highlight=False)
    return EXIT_FINISHED


def _at_least(least: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return parse


def _print(console: Console, fields: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False)
    for key, value in fields.items():
        shown = f"{value:,}" if type(value) is int else str(value)
        shown = f"{value:.4f} nats/token" if key == "unigram_entropy" else shown
        table.add_row(key.replace("_", " "), shown)
    console.print(table)


class PrepareProgress:
    """Context manager that shows progress on standard error: a bar on a terminal, else lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None
        self.last_line = -LINE_SECONDS
        self.stage = ""

    def __enter__(self) -> PrepareProgress:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("files  {task.fields[counts]}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=None, counts="")
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def report(self, progress: preparation.Progress) -> None:
        """Show where the preparation is."""
        counts = f"{progress.documents:,} documents  {progress.tokens:,} tokens"
        if self.bar is not None:
            self.bar.update(
                self.task,
                description=progress.stage,
                total=progress.files,
                completed=progress.done,
                counts=counts,
            )
            return
        now = time.monotonic()
        if progress.stage != self.stage or now - self.last_line >= LINE_SECONDS:
            self.stage, self.last_line = progress.stage, now
            reused = f" ({progress.resumed} reused)" if progress.resumed else ""
            line = f"{progress.stage}: {progress.done}/{progress.files} files{reused}, {counts}"
            self.console.print(line, highlight=False, soft_wrap=True)
