"""JSON-lines files with one record a step, such as metrics.jsonl: append, truncate, read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from moe_train.errors import DataError

HEX_TWINS = ("loss", "grad_norm", "valid_loss")
"""Fields that get a `<field>_hex` beside them, for bitwise comparison of two runs."""


def hex_float(value: float) -> str:
    """The exact value as Python's ``float.hex``; ``nan`` and ``inf`` keep their names."""
    return float(value).hex()


class JsonLines:
    """Appends records to a file that starts with the records up to some step.

    A record carries ``step`` (int) and, where it is a validation's, ``valid_loss``. The file grows
    with the run, so it is read from its end, only as far as needed.

    Args:
        path: the file; it is created when missing, and a torn last line (the writer was killed)
            is dropped.
        step: records of later steps are dropped: they are going to be trained again.

    Raises:
        DataError: a line read from the end is not a JSON object with a step.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._file = path.open("ab")
        self._last = (-1, False)
        self.truncate_after(step)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, whole on disk before the next step starts, with twins of HEX_TWINS.

        Values that JSON has no word for (nan, inf) become null; the twin keeps them.
        """
        order = (record["step"], "valid_loss" in record)
        assert order > self._last, f"step {order[0]} is already logged: truncate_after first"
        self._last = order
        line = {key: _json_value(value) for key, value in record.items()}
        for name in HEX_TWINS:
            if record.get(name) is not None:
                line.setdefault(f"{name}_hex", hex_float(record[name]))
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the records of steps after `step`, and a torn last line.

        The file is cut at a line's end, in one system call: a crash leaves the old lines or the
        remaining ones.
        """
        self._last, end = (-1, False), 0
        for start, line in _complete_lines_backwards(self.path):
            record = _parse(line, f"{self.path}: the line at byte {start}")
            if record["step"] <= step:
                self._last = (record["step"], "valid_loss" in record)
                end = start + len(line) + 1
                break
        self._file.truncate(end)

    def close(self) -> None:
        """Close the file; later appends raise ValueError."""
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file, in order; a missing file has none, a torn last line is left out.

    Raises:
        DataError: a complete line is not a JSON object with an integer step (file and line named).
    """
    if not path.exists():
        return []
    # What follows the last newline was never finished, even where it happens to parse.
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
        if not isinstance(record["step"], int):
            raise TypeError("step")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            place,
            "is not a JSON object with an integer step",
            "remove the line, or start a run with another run.name",
        ) from error
    return record


def _complete_lines_backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that end in a newline, the last one first, each with the offset of its start."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        end = content.rfind(b"\n")
        while end >= 0:
            start = content.rfind(b"\n", 0, end) + 1
            yield start, content[start:end]
            end = start - 1


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
