"""Output of commands: tables on the console, reports as JSON to a file or to standard output."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_train.errors import ConfigError


def command_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Parser of ``moe-train NAME``, whose help ends with ``examples`` as they are."""
    return argparse.ArgumentParser(
        prog=f"moe-train {name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_json_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--json FILE``."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        help=f"write {what} there as JSON (-: standard output; tables go to standard error)",
    )


def open_console(args: argparse.Namespace) -> Console:
    """Console for tables: standard output, unless ``--json -`` has that for itself."""
    return Console(stderr=args.json == "-", soft_wrap=True)


def write_json_option(args: argparse.Namespace, content: Any) -> None:
    """Write ``content`` where ``--json`` says, if it does.

    Raises:
        ConfigError: the file cannot be written.
    """
    if args.json is None:
        return
    # JSON has no NaN and no infinity: null.
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    text = json.dumps(finite, indent=1) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
        return
    try:
        Path(args.json).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("--json", str(error), "give a writable file, or -") from error
