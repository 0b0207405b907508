"""Progress of a preparation: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from moe_train.data.prepare import Progress

LINE_SECONDS = 5.0


class PrepareConsole:
    """Shows progress on standard error while it is entered."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar: Bar | None = None
        self.last_line = -LINE_SECONDS
        self.stage = ""

    def __enter__(self) -> PrepareConsole:
        if self.console.is_terminal:
            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("files  {task.fields[counts]}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=None, counts="")
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def report(self, progress: Progress) -> None:
        """Show where the preparation is."""
        counts = f"{progress.documents:,} documents  {progress.tokens:,} tokens"
        if self.bar is not None:
            self.bar.update(
                self.task,
                description=progress.stage,
                total=progress.files,
                completed=progress.done,
                counts=counts,
            )
            return
        now = time.monotonic()
        if progress.stage != self.stage or now - self.last_line >= LINE_SECONDS:
            self.stage, self.last_line = progress.stage, now
            kept = f" ({progress.resumed} kept from before)" if progress.resumed else ""
            line = f"{progress.stage}: {progress.done}/{progress.files} files{kept}, {counts}"
            self.console.print(line, highlight=False, soft_wrap=True)
