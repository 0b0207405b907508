"""The step as files: its graph (JSON, GraphML, DOT) and its picture (SVG, PNG, PDF), by suffix."""

from __future__ import annotations

import colorsys
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from moe_train.errors import ConfigError
from moe_train.features.schedules import SCHEDULES
from moe_train.planner.schedule.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRAPH_SUFFIXES = (".json", ".graphml", ".dot")
FIGURE_SUFFIXES = (".svg", ".png", ".pdf")

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
    if path.suffix not in GRAPH_SUFFIXES:
        raise ConfigError(
            "--dag", f"{path.name} has no known suffix", f"use {', '.join(GRAPH_SUFFIXES)}"
        )
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


HUES = {"forward": 0.58, "backward": 0.07}
SERVE, WAIT, UPDATE, GRADIENTS = "#cdc3e3", "#f3f3f3", "#6b6b6b", "#a3a3a3"
OPS = {
    "attention": "#4c78a8", "router": "#9ecae9", "shared expert": "#72b7b2", "experts": "#54a24b",
    "embedding": "#b279a2", "head": "#b279a2", "gather": "#f2cf5b", "scatter": "#f2cf5b",
    "ring": "#ff9da6", "dispatch": "#e45756", "combine": "#f58518", "send": "#404040",
    "gradients": GRADIENTS, "optimizer": UPDATE,
}  # fmt: skip
"""Colours of a layer's pieces."""


def draw(schedule: Schedule, path: Path, title: str = "") -> None:
    """Draw `schedule` into `path`, in the format that its suffix names.

    Raises:
        ConfigError: unknown suffix, or the file cannot be written.
    """
    if path.suffix not in FIGURE_SUFFIXES:
        known = ", ".join(FIGURE_SUFFIXES)
        raise ConfigError("--figure", f"{path.name} has no known suffix", f"use {known}")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    stages, timing = schedule.layout.pipeline, schedule.timing
    # Fixed names inside an SVG: the same schedule gives the same file.
    with mpl.rc_context({"svg.hashsalt": "moe_train", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(13, 1.9 + 0.52 * stages), layout="constrained")
        axes = figure.subplots()
        scale, unit = (1e3, "ms") if timing.step < 10 else (1.0, "s")
        for stage in range(stages):
            axes.broken_barh([(0, scale * timing.pipeline)], (stage - 0.4, 0.8), color=WAIT)
        for facts in schedule.graph.nodes.values():
            _block(axes, schedule, facts, scale)
        _frame(axes, schedule, unit, scale * timing.step, title)
        try:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=150, metadata=metadata)
        except OSError as error:
            raise ConfigError("--figure", str(error), "give a writable file") from error


def _block(axes: Axes, schedule: Schedule, facts: dict[str, Any], scale: float) -> None:
    start, width = scale * facts["start"], scale * facts["seconds"]
    if width <= 0:
        return
    colour = _colour(schedule, facts)
    rows = range(schedule.layout.pipeline) if facts["stage"] < 0 else (facts["stage"],)
    # Thin white seams would swallow thin blocks.
    seam = 0.6 if width > 0.004 * scale * schedule.timing.step else 0.0
    for row in rows:
        axes.broken_barh([(start, width)], (row - 0.4, 0.8), facecolor=colour,
                         edgecolor="white", linewidth=seam)  # fmt: skip
    share = width / (scale * schedule.timing.step)
    if facts["op"] == "pass" and facts["direction"] != "serve" and share > 0.011:
        text = str(facts["microbatch"])
        if schedule.layout.virtual_pipeline > 1 and share > 0.02:
            text += "ab cdefgh".replace(" ", "")[facts["chunk"] % 8]
        axes.text(start + width / 2, rows[0], text, ha="center", va="center", fontsize=8,
                  color="#1a1a1a")  # fmt: skip


def _colour(schedule: Schedule, facts: dict[str, Any]) -> str | tuple[float, float, float]:
    if facts["op"] != "pass":
        return OPS[facts["op"]]
    if facts["direction"] == "serve":
        return SERVE
    # Micro-batches one after the other step through four shades, chunks through the hue.
    shade = 0.80 - 0.07 * (facts["microbatch"] % 4)
    hue = HUES[facts["direction"]] - 0.035 * max(facts["chunk"], 0)
    return colorsys.hls_to_rgb(hue % 1.0, shade, 0.75)


def _frame(axes: Axes, schedule: Schedule, unit: str, end: float, title: str) -> None:
    from matplotlib.patches import Patch

    layout, timing = schedule.layout, schedule.timing
    axes.set_xlim(0, end)
    axes.set_ylim(layout.pipeline - 0.5, -0.5)
    axes.set_yticks(range(layout.pipeline), [f"stage {s}" for s in range(layout.pipeline)])
    axes.set_xlabel(f"time, {unit}")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    heading = title or f"{SCHEDULES[schedule.kind].title}, {layout.tag}, M={schedule.microbatches}"
    axes.set_title(
        f"{heading}: step {timing.step:.4g} s, "
        f"bubble {100 * schedule.predicted.bubble:.1f} %",
        loc="left", fontsize=11,
    )  # fmt: skip
    visible = timing.step / 2000
    nodes = schedule.graph.nodes.values()
    shown = {facts["op"] for facts in nodes if facts["seconds"] > visible}
    directions = {facts["direction"] for facts in nodes}
    entries: list[tuple[Any, str]] = []
    if schedule.detail == "stage":
        entries += [(colorsys.hls_to_rgb(hue, 0.72, 0.75), name) for name, hue in HUES.items()]
        if "serve" in directions:
            entries.append((SERVE, "experts serving other stages"))
    merged = {"gather": "gather, scatter", "scatter": ""}
    for op, colour in OPS.items():
        label = merged.get(op, op)
        if op in shown and label:
            entries.append((colour, label))
    entries.append((WAIT, "waiting"))
    axes.legend(
        handles=[Patch(facecolor=colour, edgecolor="#bbbbbb", linewidth=0.5, label=label)
                 for colour, label in entries],
        loc="upper center", bbox_to_anchor=(0.5, -0.18 - 0.18 / layout.pipeline),
        ncols=min(len(entries), 12), frameon=False, fontsize=8.5,
    )  # fmt: skip
