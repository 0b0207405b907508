"""The graph as a file: JSON (networkx node-link), GraphML or DOT, by suffix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx

from moe_train.errors import ConfigError

SUFFIXES = (".json", ".graphml", ".dot")

COLOURS = {
    "forward": "#a6c8e8",
    "backward": "#f6c89f",
    "serve": "#d9d2e9",
    "update": "#d0d0d0",
}
"""Fill of a node in DOT by direction."""


def write_graph(graph: Any, path: Path) -> None:
    """Write `graph` in the format that the suffix of `path` names.

    Raises:
        ConfigError: unknown suffix, or the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError("--dag", f"{path.name} has no known suffix", f"use {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".json":
            data = nx.node_link_data(graph, edges="edges")
            path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        elif path.suffix == ".graphml":
            nx.write_graphml_xml(graph, path)
        else:
            path.write_text(dot(graph), encoding="utf-8")
    except OSError as error:
        raise ConfigError("--dag", str(error), "give a writable file") from error


def dot(graph: Any) -> str:
    """The graph in Graphviz's language, laid out from left to right."""
    lines = [
        "digraph step {",
        "  rankdir=LR;",
        '  node [shape=box, style=filled, fontname="Helvetica"];',
    ]
    for name, facts in graph.nodes(data=True):
        label = f"{name}\\n{1e3 * facts['seconds']:.3f} ms"
        bold = ", penwidth=2" if facts.get("critical") else ""
        attributes = f'label={_quoted(label)}, fillcolor="{COLOURS[facts["direction"]]}"{bold}'
        lines.append(f"  {_quoted(name)} [{attributes}];")
    for source, target, facts in graph.edges(data=True):
        size = f" {facts['bytes'] / 1e6:.1f} MB" if facts["bytes"] else ""
        label = _quoted(f"{facts['kind']}{size}")
        lines.append(f"  {_quoted(source)} -> {_quoted(target)} [label={label}];")
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    # A backslash stays: it starts DOT's own escapes, and names of nodes have none.
    return '"' + text.replace('"', '\\"') + '"'
