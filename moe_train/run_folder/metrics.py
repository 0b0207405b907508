"""metrics.jsonl: one JSON line a step, the truth about a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from moe_train.errors import DataError
from moe_train.run_folder.files import write_atomically

HEX_TWINS = ("loss", "grad_norm", "valid_loss")
"""Fields that get a `<field>_hex` beside them, for bitwise comparison of two runs."""


def hex_float(value: float) -> str:
    """The exact value as Python's ``float.hex``; ``nan`` and ``inf`` keep their names."""
    return float(value).hex()


class MetricsLog:
    """Appends records to a metrics file, each whole on disk before the next step starts.

    Args:
        path: the file; it is created when missing, and a torn last line (the writer was killed)
            is dropped.

    Raises:
        DataError: a line other than the last is not a JSON object with a step.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_step = -1
        self._file = self._rewrite(read(path))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, adding the exact twins of HEX_TWINS.

        A training line carries ``loss``, a validation line ``valid_loss``; both carry ``step``
        (int). Values that JSON has no word for (nan, inf) become null; the twin keeps them.
        """
        step = record["step"]
        if "loss" in record:
            assert step > self._last_step, f"step {step} is already logged: truncate_after first"
            self._last_step = step
        line = {key: _json_value(value) for key, value in record.items()}
        for name in HEX_TWINS:
            if record.get(name) is not None:
                line.setdefault(f"{name}_hex", hex_float(record[name]))
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def truncate_after(self, step: int) -> int:
        """Drop training and validation lines of steps after `step`; returns how many.

        A run that resumes from step `step` will write those steps again. The file is replaced
        atomically: a crash here leaves the old lines or the kept ones, nothing in between.
        """
        records = read(self.path)
        kept = [record for record in records if record["step"] <= step]
        if len(kept) < len(records):
            self._file.close()
            self._file = self._rewrite(kept)
        return len(records) - len(kept)

    def close(self) -> None:
        """Close the file; later appends raise ValueError."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _rewrite(self, records: list[dict[str, Any]]) -> TextIO:
        """Make the file hold exactly `records`; returns it open for appending."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        if not self.path.exists() or self.path.read_text(encoding="utf-8") != text:
            write_atomically(self.path, text)
        self._last_step = max((r["step"] for r in records if "loss" in r), default=-1)
        # Line-buffered: a kill between two steps loses nothing.
        return self.path.open("a", encoding="utf-8", buffering=1)


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file, in order; a missing file has none, a torn last line is left.

    Raises:
        DataError: a complete line is not a JSON object with an integer step (file and line named).
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # What follows the last newline was never finished, even where it happens to parse.
    complete = lines[:-1]
    records = []
    for number, line in enumerate(complete, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError("step")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}",
                "is not a JSON object with an integer step",
                "remove the line, or start a run with another run.name",
            ) from error
        records.append(record)
    return records


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
