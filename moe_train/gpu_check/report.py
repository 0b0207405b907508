"""The report files, rewritten after every check so that a killed suite keeps its figures."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_train.files import write_atomically
from moe_train.gpu_check.bench import Check
from moe_train.gpu_check.findings import Findings, Verdict
from moe_train.gpu_check.rendering import markdown

VERSION = 1
"""Of the report's fields."""


@dataclass
class Entry:
    """One check in the report."""

    name: str
    asks: str
    gpus: int
    budget_seconds: int
    verdict: Verdict = "waiting"
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    compared: list[dict[str, Any]] = field(default_factory=list)


class Report:
    """``gpu-report.json`` and ``gpu-report.md`` in a folder.

    Args:
        folder: exists.
        checks: all that will run, in their order.
        facts: what the run is about: device, GPUs, commit, command.
    """

    def __init__(self, folder: Path, checks: list[Check], facts: dict[str, Any]) -> None:
        self.json, self.markdown = folder / "gpu-report.json", folder / "gpu-report.md"
        self._begun = time.time()
        self.state = "running"
        self.facts = facts
        self.machine: dict[str, Any] = {}
        """Hardware and versions, once they are known."""
        self.entries = {
            check.name: Entry(check.name, check.asks, check.gpus, check.seconds) for check in checks
        }
        self.write()

    def begin(self, name: str, findings: Findings) -> None:
        """A check starts; what it finds is written as it comes."""
        entry = self.entries[name]
        entry.verdict = "running"
        entry.figures, entry.compared = findings.figures, findings.compared
        findings.keep = self.write
        self.write()

    def end(self, name: str, verdict: Verdict, reason: str, seconds: float) -> None:
        """A check has its verdict."""
        entry = self.entries[name]
        entry.verdict, entry.reason, entry.seconds = verdict, reason, round(seconds, 2)
        self.write()

    def finish(self, state: str) -> None:
        """The suite ends: ``finished``, or ``interrupted``, with checks left over."""
        self.state = state
        for entry in self.entries.values():
            if entry.verdict in ("running", "waiting"):
                entry.verdict, entry.reason = "skip", entry.reason or "the suite was interrupted"
        self.write()

    @property
    def failed(self) -> bool:
        """Whether any check has failed."""
        return any(entry.verdict == "fail" for entry in self.entries.values())

    def content(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        begun = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self._begun))
        return {
            "version": VERSION,
            "state": self.state,
            "begun": begun,
            "seconds": round(time.time() - self._begun, 1),
            **self.facts,
            "machine": self.machine,
            "checks": [asdict(entry) for entry in self.entries.values()],
        }

    def write(self) -> None:
        """Replace both files."""
        content = self.content()
        write_atomically(self.json, json.dumps(content, indent=1, default=str) + "\n")
        write_atomically(self.markdown, markdown(content))
