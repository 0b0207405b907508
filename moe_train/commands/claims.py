"""``moe-train plan --claims``: judge a claims file and write the report."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from moe_train.parallel.shapes import Assumptions
from moe_train.planner.claims.document import Document
from moe_train.planner.claims.report import as_data, as_markdown, explanation
from moe_train.planner.claims.subject import Subject
from moe_train.planner.claims.verdicts import Verdict, judge
from moe_train.planner.memory.fit import assumptions_of
from moe_train.planner.resolution import resolve_run


def open_subject(
    document: Document, overrides: Sequence[str], world: int, taken: Assumptions
) -> tuple[Subject, list[Verdict]]:
    """The plan that `document` is about, with further overrides, and all verdicts.

    Raises:
        ConfigFaults: that plan is illegal.
    """
    words = [*document.overrides, *overrides]

    def replan(more: Sequence[str]) -> Subject:
        asked = [int(word[6:]) for word in more if word.startswith("world=")]
        more = [word for word in more if not word.startswith("world=")]
        changed = {word.partition("=")[0] for word in more}
        kept = [word for word in words if word.partition("=")[0] not in changed]
        run = resolve_run([*kept, *more], asked[0] if asked else world)
        config, layout = run.config, run.layout
        return Subject(config, layout, assumptions_of(config, taken.imbalance, taken.fragmentation))

    subject = replan([])
    return subject, judge(document, subject, replan)


def show(verdicts: list[Verdict], document: Document, console: Console) -> None:
    """Print a table a section."""
    by_id = {verdict.claim.id: verdict for verdict in verdicts}
    for section in document.sections:
        table = Table(
            title=section.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
            padding=(0, 1, 0, 0), leading=1,
        )  # fmt: skip
        table.add_column("", no_wrap=True)
        # Overrides are there to be copied: they may be broken over lines, never cut.
        for name, ratio in (("claim", 5), ("verdict", 3), ("why", 9)):
            table.add_column(name, ratio=ratio, overflow="fold")
        for claim in section.claims:
            verdict = by_id[claim.id]
            table.add_row(claim.id, claim.text, verdict.words, explanation(verdict))
        console.print(table)


def check_claims(
    document: Document,
    overrides: Sequence[str],
    world: int,
    taken: Assumptions,
    console: Console,
) -> tuple[str, str]:
    """Judge, print, and return the report as (Markdown, JSON)."""
    subject, verdicts = open_subject(document, overrides, world, taken)
    show(verdicts, document, console)
    data = as_data(document, verdicts, subject)
    counts = ", ".join(f"{count} {kind}" for kind, count in data["counts"].items())
    console.print(f"{len(verdicts)} claims: {counts}")
    return as_markdown(document, verdicts, subject), json.dumps(data, indent=1) + "\n"
