"""``python -m benchmarks.published``: predicted beside published, with error and order."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.published.fit import fit, left_out, names, start, with_values
from benchmarks.published.page import COMMAND, PAGE, conditions, difference, layout, page, summary
from benchmarks.published.rows import Entry, scored
from benchmarks.published.score import Comparison, compare, pairs, score
from moe_train.planner.cost import constants as cost


def fitted() -> list[Entry]:
    """The rows that constants are fitted to."""
    return [one for one in scored() if not one.run.held_out]


def mean_left_out() -> float:
    """Mean error of the fitted rows, each predicted by constants fitted to the others."""
    rows = fitted()
    groups = left_out(rows, start(), lambda one: one.run.id)
    errors = [one.error for group in groups for one in group.compared]
    return sum(errors) / len(errors)


def report(compared: Sequence[Comparison], left: float) -> dict[str, Any]:
    """The comparison as JSON."""
    judged = [one for one in compared if one.entry.run.scored]
    return {
        "score": {**asdict(score(compared)), "order": score(compared).order, "left_out": left},
        "constants": asdict(cost.CONSTANTS),
        "runs": [
            {
                **asdict(one.entry.run),
                "scored": one.entry.run.scored,
                "source": one.entry.source.document,
                "published_seconds": one.published,
                "predicted_seconds": one.predicted,
                "published_tflops": one.published_rate,
                "predicted_tflops": one.predicted_rate,
                "error": one.error,
            }
            for one in compared
        ],
        "wrong_order": [
            [a.entry.run.id, b.entry.run.id] for a, b, right in pairs(judged) if not right
        ],
    }


def show(console: Console, compared: Sequence[Comparison], left: float) -> None:
    """The table and the score."""
    table = Table("run", "GPUs", "layout", "conditions", "published", "predicted", "")
    for one in compared:
        run = one.entry.run
        table.add_row(
            run.id,
            f"{run.gpus} {run.hardware.split('_')[0]}",
            layout(one),
            conditions(one),
            f"{one.published_rate:.0f}",
            f"{one.predicted_rate:.0f}",
            difference(one),
            style=None if run.scored else "dim",
        )
    console.print(table)
    console.print(
        "TFLOP/s of a GPU; dim: listed, not scored", *summary(score(compared), left), sep="\n"
    )


def show_fit(console: Console) -> None:
    """Fitted constants, and the error of what was left out."""
    rows = fitted()
    values = fit(rows)
    for name, value in zip(names(), values, strict=True):
        console.print(f"{name}: float = {value:.3g}")
    with cost.using(with_values(values)):
        console.print(*summary(score(compare(scored())), mean_left_out()), sep="\n")
    for title, group in (("model", _model), ("source", _file)):
        groups = left_out(rows, values, group)
        errors = [one.error for one in chain.from_iterable(each.compared for each in groups)]
        console.print(f"One {title} left out: mean error {sum(errors) / len(errors):.1%}")
        for each in groups:
            console.print(f"  {each.name}: {each.mean:.1%}")


def _model(one: Entry) -> str:
    return one.run.model


def _file(one: Entry) -> str:
    return one.file


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare; or fit the constants."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the comparison; - is stdout")
    parser.add_argument("--write", action="store_true", help="write docs/published.md")
    parser.add_argument("--fit", action="store_true", help="fit the constants and print them")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if args.fit:
        show_fit(console)
        return
    compared, left = compare(), mean_left_out()
    if args.json:
        text = json.dumps(report(compared, left), indent=2) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
            return
        Path(args.json).write_text(text)
    if args.write:
        PAGE.write_text(page(compared, left))
    show(console, compared, left)


if __name__ == "__main__":
    main()
