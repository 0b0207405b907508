"""docs/architecture.md says where things are: every path and symbol that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (?P<question>[^|]+) \| `(?P<path>[^`|]+)` \| `(?P<symbol>[^`|]+)` \|$", re.M)
ANSWERS = [match.groups() for match in ROW.finditer(PAGE)]


def defined(path: Path) -> set[str]:
    """Names that a module defines at its top, and methods and fields of its classes.

    Words and keys of a file that is no module.
    """
    if path.suffix != ".py":
        return set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    names = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            match node:
                case ast.FunctionDef(name=name):
                    names.add(prefix + name)
                case ast.ClassDef(name=name, body=inner):
                    names.add(prefix + name)
                    collect(inner, f"{prefix}{name}.")
                case ast.AnnAssign(target=ast.Name(id=name)):
                    names.add(prefix + name)
                case ast.Assign(targets=targets):
                    names.update(prefix + t.id for t in targets if isinstance(t, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return names


def test_thirty_questions_are_answered() -> None:
    assert len(ANSWERS) >= 30
    questions = [question for question, _, _ in ANSWERS]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize(("question", "path", "symbol"), ANSWERS)
def test_the_answer_exists(question: str, path: str, symbol: str) -> None:
    assert symbol in defined(ROOT / path), f"{question}: {path} has no {symbol}"


def test_every_package_is_described() -> None:
    table = PAGE.split("## A token")[0]
    for package in (ROOT / "moe_train").iterdir():
        if (package / "__init__.py").exists():
            assert f"`{package.name}/`" in table, package.name
