"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def markdown(content: Mapping[str, Any]) -> str:
    """The page of a report's JSON content."""
    return "\n".join(_lines(content)) + "\n"


def _lines(content: Mapping[str, Any]) -> Iterator[str]:
    checks = content["checks"]
    counts = {v: sum(check["verdict"] == v for check in checks) for v in ("pass", "fail", "skip")}
    yield "# GPU check"
    yield ""
    output = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    yield f"{content['state']}: {output} of {len(checks)} checks, {content['seconds']:g} s, "
    yield f"begun {content['begun']}, commit {content['commit']}, `{content['command']}`."
    yield ""
    if content["machine"]:
        yield "| machine | |"
        yield "|---|---|"
        for key, value in content["machine"].items():
            yield f"| {key} | {cell(value)} |"
        yield ""
    yield "| check | verdict | seconds | asks | reason |"
    yield "|---|---|---:|---|---|"
    for check in checks:
        reason = check["reason"].splitlines()[0] if check["reason"] else ""
        yield (
            f"| {check['name']} | {check['verdict']} | {check['seconds']:.1f} | {check['asks']} "
            f"| {cell(reason)} |"
        )
    rows = [(check["name"], row) for check in checks for row in check["compared"]]
    if rows:
        yield ""
        yield "## Predicted and measured"
        yield ""
        yield "| check | what | unit | predicted | measured | measured / predicted |"
        yield "|---|---|---|---:|---:|---:|"
        for name, row in rows:
            yield (
                f"| {name} | {row['what']} | {row['unit']} | {number(row['predicted'])} "
                f"| {number(row['measured'])} | {number(row['measured_over_predicted'])} |"
            )
    for check in checks:
        if check["figures"] or "\n" in check["reason"]:
            yield ""
            yield f"## {check['name']}"
            yield ""
            yield from _figures(check["figures"])
        if "\n" in check["reason"]:
            yield ""
            yield "```"
            yield check["reason"]
            yield "```"


def _figures(figures: Mapping[str, Any]) -> Iterator[str]:
    tables = {key: value for key, value in figures.items() if _is_table(value)}
    for key, value in figures.items():
        if key not in tables:
            yield f"- {key}: {cell(value)}"
    for key, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        yield ""
        yield f"{key}:"
        yield ""
        yield "| " + " | ".join(columns) + " |"
        yield "|" + "---|" * len(columns)
        for row in rows:
            yield "| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |"


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def number(value: Any) -> str:
    """A number to four digits; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def cell(value: Any) -> str:
    """A value on one line, safe inside a table."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {cell(item)}" for key, item in value.items())
    elif isinstance(value, list):
        value = ", ".join(cell(item) for item in value)
    return number(value).replace("\n", " ").replace("|", "\\|")
