"""Every use of CUDA in a module's source, by syntax alone: what the host must have an answer to.

Recognised are names under ``torch.cuda``, ``from torch.cuda import``, the literal ``"cuda"`` as
a device, and the tensor methods ``.cuda()`` and ``.record_stream()``. Comparisons such as
``device.type == "cuda"`` are guards, not uses.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

DEVICE = re.compile(r"cuda(:.*)?")
METHOD = re.compile(r"cuda|record_stream")
# `torch.cuda.current_stream().wait_stream(..)`: what is asked of these belongs to the stand-ins.
FACTORY_OF_OBJECTS = ("Stream", "Event", "current_stream")


@dataclass(frozen=True)
class Use:
    """One use: ``kind`` is attribute, literal or method, ``name`` what is used."""

    module: str
    line: int
    scope: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.kind} {self.name} in {self.scope or 'module'}"


def uses(module: str, source: str) -> Iterator[Use]:
    """All CUDA uses in ``source``, in no particular order.

    Attribute names are relative to ``torch.cuda`` (``nvtx.range_push``); a literal's name is the
    function that receives it (``torch.zeros``, ``.to``).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        result = _classify(node, parents)
        for kind, name in result:
            yield Use(module, node.lineno, _scope(node, parents), kind, name)  # type: ignore[attr-defined]


def _classify(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> list[tuple[str, str]]:
    if isinstance(node, ast.Attribute):
        chain = ast.unparse(node)
        if re.fullmatch(r"torch\.cuda\.[\w.]+", chain):
            # Only the whole chain counts: torch.cuda.nvtx.range_push, not torch.cuda.nvtx.
            longer = isinstance(parents[node], ast.Attribute)
            return [] if longer else [("attribute", chain.removeprefix("torch.cuda."))]
        made = re.fullmatch(r"torch\.cuda\.(\w+)\(.*\)\.(\w+)", chain, re.DOTALL)
        if made and made[1] in FACTORY_OF_OBJECTS:
            return [("object", f"{made[1]}.{made[2]}")]
        called = isinstance(parents[node], ast.Call) and parents[node].func is node  # type: ignore[attr-defined]
        if METHOD.fullmatch(node.attr) and called:
            return [("method", node.attr)]
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.cuda"):
        prefix = (node.module or "").removeprefix("torch.cuda").lstrip(".")
        return [("attribute", f"{prefix}.{a.name}".lstrip(".")) for a in node.names]
    elif (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and DEVICE.fullmatch(node.value)
        and (receiver := _receiver(node, parents))
    ):
        return [("literal", receiver)]
    return []


def _receiver(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    """Who is given the literal; empty for a comparison."""
    outer = parents[node]
    while isinstance(outer, (ast.keyword, ast.JoinedStr, ast.IfExp)):
        outer = parents[outer]
    if isinstance(outer, ast.Compare):
        return ""
    if isinstance(outer, ast.Call):
        if isinstance(outer.func, ast.Attribute):
            chain = ast.unparse(outer.func)
            return chain if re.fullmatch(r"torch(\.\w+)+", chain) else f".{outer.func.attr}"
        return ast.unparse(outer.func)
    if isinstance(outer, ast.arguments):
        return "a default argument"
    return type(outer).__name__


def _scope(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    names: list[str] = []
    while node in parents:
        node = parents[node]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
    return ".".join(reversed(names))
