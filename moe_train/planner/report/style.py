"""How the planner's tables and figures look: narrow enough for 80 columns, nothing cut off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rich import box
from rich.table import Table


def table_of(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    return table


class Unit(NamedTuple):
    """A power of a thousand and its SI prefix."""

    size: float
    prefix: str

    def show(self, value: float, digits: int = 2) -> str:
        """`value` in this unit, without the prefix."""
        return f"{value / self.size:,.{digits}f}"


UNITS = (Unit(1e12, "T"), Unit(1e9, "G"), Unit(1e6, "M"), Unit(1e3, "k"))


def unit_of(values: Iterable[float]) -> Unit:
    """The unit in which the largest of `values` is 1 or more."""
    largest = max(values, default=0.0)
    return next((unit for unit in UNITS if largest >= unit.size), Unit(1.0, ""))


def billions(count: int) -> str:
    """A number of parameters."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count:,}"


def seconds_text(value: float) -> str:
    """Seconds with three digits, in ms below a tenth."""
    if value < 0.1:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.2f} s" if value < 100 else f"{value:,.0f} s"


def share_text(value: float, digits: int = 1) -> str:
    """A share in per cent."""
    return f"{100 * value:.{digits}f} %"
