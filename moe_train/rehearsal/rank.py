"""One rank of a rehearsal: the training program inside the fakes, and its report."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_train.rehearsal.library import NAME


@dataclass(frozen=True)
class Case:
    """One rehearsed run.

    Everything is a run's own but ``plant`` and ``instead``, which are for tests.
    """

    overrides: tuple[str, ...]
    world: int = 1
    memory_gb: float = 8.0
    available_gb: float | None = None
    """What other processes leave of a device's memory; None leaves all."""
    plant: str = ""
    """``module:function`` that is called in every rank before it starts."""
    instead: str = ""
    """``module:function`` that is called with the rank, in place of the program."""


@dataclass
class RankReport:
    """Exit code, failure, copies and findings of one rank."""

    code: int = -1
    """Exit code of the program; -1 where it did not end by itself."""
    failure: str = ""
    """Traceback of what the program did not handle."""
    copies: list[dict[str, Any]] = field(default_factory=list)
    """Copies to the host: kind, place, source, count."""
    findings: list[dict[str, Any]] = field(default_factory=list)
    launches: int = 0
    """Kernels that were launched past the stand-ins; each of them was refused."""
    synchronizations: int = 0
    """Waits for a device, a stream or an event."""

    @property
    def sound(self) -> bool:
        """Whether the program finished and nothing was found."""
        return self.code == 0 and not self.failure and not self.findings and not self.launches

    def copies_at(self, place: str, kind: str | None = None) -> int:
        """Copies to the host in one part of the program."""
        return sum(
            copy["count"]
            for copy in self.copies
            if copy["place"] == place and kind in (None, copy["kind"])
        )


def run_rank(case: Case, rank: int, port: int) -> RankReport:
    """Be ``rank`` of the case's world; the process must have been started for rehearsals."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(case.world),
        "LOCAL_WORLD_SIZE": str(case.world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from moe_train.rehearsal.kernels import in_every_thread
    from moe_train.rehearsal.nccl import nccl_on_host
    from moe_train.rehearsal.rules import Recorder
    from moe_train.run.main import main

    report, recorder = RankReport(), Recorder()
    with in_every_thread(recorder), nccl_on_host(), recorder.audit.active():
        try:
            if case.plant:
                _named(case.plant)()
            if case.instead:
                _named(case.instead)(rank)
                report.code = 0
            else:
                report.code = main(case.overrides)
        except BaseException:  # noqa: BLE001  it is the result
            report.failure = traceback.format_exc()
    report.copies = [asdict(event) | {"count": n} for event, n in recorder.copies.items()]
    report.findings = [asdict(event) | {"count": n} for event, n in recorder.findings.items()]
    library = ctypes.CDLL(NAME)
    for name in ("launches", "synchronizations"):
        function = getattr(library, f"rehearsal_{name}")
        function.restype = ctypes.c_long
        setattr(report, name, function())
    return report


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def from_json(text: str) -> list[list[RankReport]]:
    """Reports by case and rank."""
    return [[RankReport(**rank) for rank in case] for case in json.loads(text)]


def to_json(cases: Sequence[Sequence[RankReport]]) -> str:
    """The same as text."""
    return json.dumps([[asdict(rank) for rank in case] for case in cases], indent=1)
