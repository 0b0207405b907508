"""``moe-train checkpoint list`` and ``moe-train checkpoint verify``: no torch, no GPU needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from moe_train.checkpoint import folders
from moe_train.checkpoint.manifest import NAME, verify
from moe_train.commands.output import (
    add_json_option,
    command_parser,
    open_console,
    write_json_option,
)
from moe_train.errors import EXIT_CHECKPOINT, EXIT_FINISHED, CheckpointError

LIST_EXAMPLES = """examples:
  moe-train checkpoint list runs/twin-TP2.PP4.EP8.span
  moe-train checkpoint list runs/twin-TP2.PP4.EP8.span/checkpoints --json list.json
  moe-train checkpoint list runs/notes --quick     sizes only, no hashing

exit code: 0 all sound; 4 damage, or no checkpoint there
"""

VERIFY_EXAMPLES = """examples:
  moe-train checkpoint verify runs/notes                              all of a run
  moe-train checkpoint verify runs/notes/checkpoints/step_00000100
  moe-train checkpoint verify runs/*/checkpoints/step_* --json -      report on standard output

Every file is compared with the size in the manifest, every block of it with its SHA-256.
exit code: 0 all sound; 4 damage
"""


@dataclass(frozen=True)
class Row:
    """One checkpoint in the table and the report."""

    path: str
    step: int | None
    layout: str
    samples: int | None
    """Training samples consumed when it was written."""
    bytes: int
    """Size of all files that are there."""
    verified: bool
    damage: str
    """What is wrong with it; empty when sound."""


def list_main(argv: Sequence[str]) -> int:
    """Run ``checkpoint list``; returns the exit code.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    parser = command_parser(
        "checkpoint list", "Committed checkpoints of a run, newest first.", LIST_EXAMPLES
    )
    parser.add_argument("path", type=Path, metavar="RUN|FOLDER", help="run or checkpoint folder")
    parser.add_argument("--quick", action="store_true", help="compare sizes only, not hashes")
    add_json_option(parser, "the table")
    args = parser.parse_intermixed_args(argv)
    paths = checkpoints_of(args.path)
    if paths == [args.path] and not (args.path / NAME).exists():
        raise CheckpointError(
            str(args.path), "has no committed checkpoint", "give a run folder, such as runs/NAME"
        )
    rows = [inspect(path, deep=not args.quick) for path in paths]
    write_json_option(args, _report(rows))
    return _print(rows, open_console(args))


def verify_main(argv: Sequence[str]) -> int:
    """Run ``checkpoint verify``; returns the exit code."""
    parser = command_parser(
        "checkpoint verify", "Compare checkpoints with their manifests.", VERIFY_EXAMPLES
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN|FOLDER", help="run or checkpoint folder"
    )
    add_json_option(parser, "the table")
    args = parser.parse_intermixed_args(argv)
    rows = [inspect(path, deep=True) for given in args.paths for path in checkpoints_of(given)]
    write_json_option(args, _report(rows))
    return _print(rows, open_console(args))


def checkpoints_of(path: Path) -> list[Path]:
    """Committed checkpoints of a run folder or its ``checkpoints/``, else ``path`` itself."""
    inner = path / "checkpoints"
    return folders.committed(inner if inner.is_dir() else path) or [path]


def inspect(folder: Path, deep: bool) -> Row:
    """Verify one checkpoint; damage is reported in the row.

    Args:
        deep: compare hashes too, not sizes alone.
    """
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) if folder.is_dir() else 0
    try:
        manifest = verify(folder, deep, threads=min(8, os.cpu_count() or 1))
    except CheckpointError as damage:
        return Row(str(folder), None, "", None, size, False, f"{damage.field}: {damage.problem}")
    return Row(
        str(folder), manifest.step, manifest.layout, manifest.consumed_samples, size, True, ""
    )


def _report(rows: Sequence[Row]) -> dict[str, object]:
    damaged = sum(not row.verified for row in rows)
    return {"checkpoints": [asdict(row) for row in rows], "damaged": damaged}


def _print(rows: Sequence[Row], console: Console) -> int:
    """Print the table, with damage below it, where a narrow terminal cannot cut it."""
    table = Table("step", "layout", "samples", "size", "verified", "checkpoint", box=None)
    for row in rows:
        table.add_row(
            "?" if row.step is None else str(row.step),
            row.layout or "?",
            "?" if row.samples is None else f"{row.samples:,}",
            decimal(row.bytes),
            "yes" if row.verified else "NO",
            Path(row.path).name,
        )
    console.print(table)
    damaged = [row for row in rows if not row.verified]
    for row in damaged:
        console.print(f"damaged: {row.damage}", markup=False, highlight=False)
    return EXIT_CHECKPOINT if damaged else EXIT_FINISHED
