"""Results of a check: figures, failures, or the reason why it was skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "fail", "skip", "running", "waiting"]


class Skip(Exception):
    """Raised by a check that does not apply on this machine; the text is the reason."""


class Failed(Exception):
    """Raised by a check that cannot go on; its text is the reason."""


@dataclass
class Findings:
    """Figures and failures of one check so far; reported even when the check is killed."""

    figures: dict[str, Any] = field(default_factory=dict)
    """Measured numbers and short texts, by what they are."""
    compared: list[dict[str, Any]] = field(default_factory=list)
    """Rows of predicted beside measured."""
    failures: list[str] = field(default_factory=list)
    """Every reason to fail; none of them stops the check."""
    keep: Callable[[], None] = field(default=lambda: None, repr=False)
    """Called when something was added."""

    def note(self, **figures: Any) -> None:
        """Add figures."""
        self.figures.update(figures)
        self.keep()

    def compare(self, what: str, unit: str, predicted: float | None, measured: float) -> None:
        """Add a row; ``predicted`` is None where the plan has no figure for it."""
        ratio = measured / predicted if predicted else None
        row = {"what": what, "unit": unit, "predicted": predicted, "measured": measured}
        self.compared.append(row | {"measured_over_predicted": ratio})
        self.keep()

    def fail(self, reason: str) -> None:
        """The check has failed, and goes on."""
        self.failures.append(reason)
        self.keep()

    def require(self, holds: bool, reason: str) -> None:
        """Fail for ``reason`` unless ``holds``."""
        if not holds:
            self.fail(reason)
