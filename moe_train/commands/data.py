"""``moe-train data prepare`` and ``moe-train data inspect``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_train.data.manifest import write_json
from moe_train.errors import DataError, MoeTrainError

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
  moe-train data inspect data/web --verify --json report.json
"""


def prepare_main(argv: Sequence[str]) -> int:
    """Run ``data prepare``; returns the exit code."""
    parser = _parser("prepare", "Turn text into a dataset to train on.", PREPARE_EXAMPLES)
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
    add("--workers", type=_positive, default=1, metavar="N", help="processes (1)")
    add("--overwrite", action="store_true", help="replace files at PREFIX")
    add("--json", type=Path, metavar="FILE", help="write the manifest there as well")
    asked = parser.parse_args(argv)

    def run() -> None:
        with warnings.catch_warnings():
            # Megatron warns of missing GPU libraries, which no preparation needs.
            warnings.simplefilter("ignore")
            from moe_train.data.console import PrepareConsole
            from moe_train.data.prepare import Request, prepare
        request = Request(
            sources=tuple(asked.sources),
            output=asked.output,
            tokenizer=asked.tokenizer,
            eod_name=asked.eod,
            append_eod=asked.append_eod,
            text_key=asked.text_key,
            workers=asked.workers,
            overwrite=asked.overwrite,
        )
        try:
            with PrepareConsole() as console:
                manifest = prepare(request, console.report)
        except KeyboardInterrupt:
            print("interrupted: the same command continues from here", file=sys.stderr)
            raise
        found = asdict(manifest)
        _write_json(asked.json, found)
        _show(
            {
                "prefix": str(asked.output),
                **{key: found[key] for key in ("documents", "skipped_documents", "tokens")},
                **{key: found[key] for key in ("vocab_size", "dtype", "unigram_entropy")},
            }
        )

    return _guarded(run)


def inspect_main(argv: Sequence[str]) -> int:
    """Run ``data inspect``; returns the exit code."""
    parser = _parser("inspect", "Show what a prepared dataset holds.", INSPECT_EXAMPLES)
    add = parser.add_argument
    add("prefix", type=Path, help="the dataset's PREFIX")
    add("--samples", type=_count, default=0, metavar="K", help="decode the start of K documents")
    add("--tokenizer", help="for data without a manifest: byte or a tokenizer.json file")
    add("--verify", action="store_true", help="compare the files' sha256 with the manifest")
    add("--json", type=Path, metavar="FILE", help="write the report there as well")
    asked = parser.parse_args(argv)

    def run() -> None:
        from moe_train.data.inspection import inspect

        report = inspect(asked.prefix, asked.samples, asked.tokenizer, asked.verify)
        _write_json(asked.json, report)
        samples = report.pop("samples", [])
        _show(report)
        for sample in samples:
            print(
                f"\n--- document {sample['sequence']}, {sample['tokens']} tokens: {sample['ids']}"
            )
            if sample["text"] is not None:
                print(sample["text"])

    return _guarded(run)


def _parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"moe-train data {name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _guarded(run: Any) -> int:
    try:
        run()
    except MoeTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _write_json(path: Path | None, content: Any) -> None:
    if path is None:
        return
    try:
        write_json(path, content)
    except OSError as error:
        raise DataError(
            str(path), f"cannot be written: {error.strerror}", "another --json"
        ) from error


def _show(facts: dict[str, Any]) -> None:
    width = max(map(len, facts))
    for key, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        shown = f"{value:.4f} nats/token" if key == "unigram_entropy" else shown
        print(f"{key.replace('_', ' '):<{width}}  {shown}")
