"""Tests that scripts, the Makefile and the documentation name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    *(path for path in sorted((ROOT / "launch").iterdir()) if path.is_file()),
    *(ROOT / "Makefile", ROOT / ".ci" / "run"),
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMED = re.compile(r"(?<![\w/.-])tests/[\w./*-]*[\w/*]|(?<![\w/*-])test_[\w*]+\.py")


def missing(text: str) -> list[str]:
    """Paths and bare file names of tests in ``text`` that match no file."""
    named = dict.fromkeys(NAMED.findall(text))
    return [
        name
        for name in named
        if not any(ROOT.glob(name) if "/" in name else (ROOT / "tests").rglob(name))
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_test_that_is_named_exists(path: Path) -> None:
    assert missing(path.read_text(encoding="utf-8")) == []


def test_a_test_that_moved_is_reported() -> None:
    text = "run\n  tests/test_kernels_*.py\n  tests/backend/test_kernels_*.py test_nowhere.py\n"
    assert missing(text) == ["tests/test_kernels_*.py", "test_nowhere.py"]
