"""The comparison as text: a table for a terminal, and the page docs/published.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.published.rows import entries
from benchmarks.published.score import APART, Comparison, Score, pairs, score

PAGE = Path(__file__).resolve().parents[2] / "docs" / "published.md"
COMMAND = "python -m benchmarks.published"


def layout(one: Comparison) -> str:
    """The parallel sizes above 1."""
    sizes = one.entry.run.layout
    named = (
        ("TP", sizes.tensor),
        ("CP", sizes.context),
        ("PP", sizes.pipeline),
        ("VPP", sizes.virtual_pipeline),
        ("EP", sizes.expert),
        ("ETP", sizes.expert_tensor),
    )
    return " ".join(f"{name}{size}" for name, size in named if size > 1)


def conditions(one: Comparison) -> str:
    """What distinguishes the run beside its layout."""
    run = one.entry.run
    parts = [run.dtype + (f" {run.fp8_recipe}" if run.fp8_recipe else ""), run.dispatcher]
    parts += ["overlap"] if run.overlap else []
    parts += ["graphs"] if run.cuda_graphs else []
    if run.recompute != "none":
        modules = run.recompute if isinstance(run.recompute, list) else [run.recompute]
        parts.append("recompute " + "+".join(modules))
    parts += [] if run.routing == "forced" else [run.routing]
    return ", ".join(parts)


def difference(one: Comparison) -> str:
    """Predicted rate over the published one, in per cent."""
    return f"{(one.predicted_rate / one.published_rate - 1) * 100:+.0f} %"


def summary(whole: Score, left: float) -> list[str]:
    """The score in sentences."""
    return [
        f"{whole.rows} scored runs of {whole.models} models: mean error {whole.mean:.1%}, largest "
        f"{whole.worst:.1%} ({whole.worst_row}).",
        f"Leave-one-out mean error: {left:.0%}.",
        f"Of {whole.pairs} pairs of one model whose figures differ by more than {APART:.0%}, "
        f"{whole.order:.0%} are predicted in the right order.",
    ]


def page(compared: Sequence[Comparison], left: float) -> str:
    """docs/published.md."""
    return "\n".join(_page(compared, left)) + "\n"


def _page(compared: Sequence[Comparison], left: float) -> Iterator[str]:
    yield from HEAD.splitlines()
    yield from ("", *summary(score(compared), left), "")
    for title, chosen in (
        ("Scored", [one for one in compared if one.entry.run.scored]),
        ("Listed, not scored", [one for one in compared if not one.entry.run.scored]),
    ):
        yield from (f"## {title}", "")
        yield "| run | GPUs | layout | batch, sequence | conditions | published | predicted | |"
        yield "|---|---|---|---|---|---|---|---|"
        for one in chosen:
            run = one.entry.run
            machine = run.hardware.split("_")[0].upper()
            mark = " (held out)" if run.held_out else ""
            yield (
                f"| {run.id}{mark} | {run.gpus} {machine} | {layout(one)} | "
                f"{run.global_}/{run.micro}, {run.sequence} | {conditions(one)} | "
                f"{one.published_rate:.0f} | {one.predicted_rate:.0f} | {difference(one)} |"
            )
        yield ""
    yield from ("Why these are not scored:", "")
    for one in compared:
        if not one.entry.run.scored:
            yield f"- {one.entry.run.id}: {one.entry.run.unscored}."
    yield from ("", "## Pairs in the wrong order", "")
    wrong = [
        (a, b) for a, b, right in pairs([o for o in compared if o.entry.run.scored]) if not right
    ]
    yield from (
        f"- {a.entry.run.id} ({a.published_rate:.0f}, predicted {a.predicted_rate:.0f}) and "
        f"{b.entry.run.id} ({b.published_rate:.0f}, predicted {b.predicted_rate:.0f})"
        for a, b in wrong
    )
    yield "" if wrong else "None."
    yield from ("", "## Sources", "")
    files = {one.file: one.source for one in entries()}
    for name, source in files.items():
        if source.document != "see each row":
            counted = source.flops.rstrip(".")
            yield f"- `{name}`: {source.document}. {source.stack}. FLOPs: {counted}."


HEAD = f"""# Predictions beside published runs

Model TFLOP/s of a GPU, by the planner's count of FLOPs (half of the attention matrix). `{COMMAND}`
prints this table, `--write` writes this page, `--fit` fits the constants of
`moe_train/planner/cost/constants.py` to the scored runs and prints the error of runs, models and
sources that are left out. The runs are data, in `benchmarks/published/`; each says what its source
does not state and what was assumed for it.

The error of a run is the larger of predicted and published over the smaller, less one. Every model
weighs the same in the fit. A run that is held out is scored and never fitted."""
