"""``moe-train checkpoint list`` and ``moe-train checkpoint verify``: no torch, no GPU needed."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_train.checkpoint import folders
from moe_train.checkpoint.manifest import verify
from moe_train.errors import EXIT_CHECKPOINT, EXIT_FINISHED, CheckpointError, ConfigError

LIST_EXAMPLES = """examples:
  moe-train checkpoint list runs/twin-TP2.PP4.EP8.span
  moe-train checkpoint list runs/twin-TP2.PP4.EP8.span/checkpoints --json list.json
  moe-train checkpoint list runs/notes --quick     sizes only, no hashing

exit code: 0 all sound; 4 damage, or nothing there
"""

VERIFY_EXAMPLES = """examples:
  moe-train checkpoint verify runs/notes/checkpoints/step_00000100
  moe-train checkpoint verify runs/*/checkpoints/step_* --json report.json

Every file is compared with the size in the manifest, every block of it with its SHA-256.
exit code: 0 all sound; 4 damage
"""


@dataclass(frozen=True)
class Row:
    """What is known of one checkpoint."""

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
    parser = _parser("list", "Committed checkpoints of a run, newest first.", LIST_EXAMPLES)
    parser.add_argument("run", type=Path, help="run folder, or its checkpoints folder")
    parser.add_argument("--quick", action="store_true", help="compare sizes only, not hashes")
    asked = parser.parse_intermixed_args(argv)
    inner = asked.run / "checkpoints"
    root = inner if inner.is_dir() else asked.run
    found = folders.committed(root)
    if not found:
        raise CheckpointError(
            str(root), "has no committed checkpoint", "give a run folder, such as runs/NAME"
        )
    return _report([inspect(folder, deep=not asked.quick) for folder in found], asked.json)


def verify_main(argv: Sequence[str]) -> int:
    """Run ``checkpoint verify``; returns the exit code."""
    parser = _parser("verify", "Compare checkpoints with their manifests.", VERIFY_EXAMPLES)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="checkpoint folder")
    asked = parser.parse_intermixed_args(argv)
    return _report([inspect(path, deep=True) for path in asked.paths], asked.json)


def inspect(folder: Path, deep: bool) -> Row:
    """Facts of one checkpoint; damage is told in the row.

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


def _parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"moe-train checkpoint {name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    return parser


def _report(rows: Sequence[Row], target: Path | None) -> int:
    """Show the table; damage in words below it, where a narrow terminal cannot cut it."""
    table = Table("step", "layout", "samples", "size", "verified", "checkpoint", box=None)
    for row in rows:
        table.add_row(
            "?" if row.step is None else str(row.step),
            row.layout or "?",
            "?" if row.samples is None else f"{row.samples:,}",
            _readable(row.bytes),
            "yes" if row.verified else "NO",
            Path(row.path).name,
        )
    console = Console(soft_wrap=True)
    console.print(table)
    damaged = [row for row in rows if not row.verified]
    for row in damaged:
        console.print(f"damaged: {row.damage}", markup=False, highlight=False)
    if target is not None:
        report = {"checkpoints": [asdict(row) for row in rows], "damaged": len(damaged)}
        try:
            target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError("--json", str(error), "give a writable file") from error
    return EXIT_CHECKPOINT if damaged else EXIT_FINISHED


def _readable(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
