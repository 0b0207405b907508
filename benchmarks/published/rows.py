"""The published runs: one YAML file a source, read into `Run` objects.

A file holds a `source`, `defaults` of its rows and `runs`. A row has what its source states;
what it does not state is named in `assumed`, with the reason. A row that no prediction should be
judged by is listed with its reason in `unscored`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked

FOLDER = Path(__file__).resolve().parent
MODELS = "models.yaml"
STRICT = ConfigDict(extra="forbid")

Unit = Literal["mfu", "tflops", "tokens", "seconds"]
Routing = Literal["forced", "drop", "natural"]


@checked(frozen=True, config=STRICT)
class Source:
    """Where the figures of a file stand."""

    document: str
    stack: str
    """Software and cluster."""
    flops: str
    """How the source counts FLOPs, where its figures are rates of FLOPs."""


@checked(frozen=True, config=STRICT)
class Model:
    """A model that was trained."""

    source: str
    parameters: float | None
    """Total that its authors publish; None where they publish none."""
    model: dict[str, Any]
    """Keys of the config group ``model``."""


@checked(frozen=True, config=STRICT)
class Sizes:
    """Parallel sizes, by the names of the config group ``parallel``."""

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int
    virtual_pipeline: int = 1
    context: int = 1


@checked(frozen=True, config=STRICT)
class Run:
    """One published figure and the run that it belongs to."""

    id: str
    place: str
    """Table, section or file of the source."""
    model: str
    hardware: str
    gpus: int
    layout: Sizes
    global_: int
    """Sequences of a step."""
    micro: int
    sequence: int
    dtype: Literal["bf16", "fp8"]
    dispatcher: Literal["alltoall", "deepep", "hybridep"]
    overlap: list[Literal["expert"]]
    recompute: Literal["none", "all"] | list[str]
    routing: Routing
    """forced: even by construction; drop: capacity factor 1, padded; natural: the router's own."""
    figure: float
    unit: Unit
    """mfu (share of peak_tflops), TFLOP/s or tokens/s of a GPU, or seconds of a step."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    fp8_param_gather: bool = False
    """Whether weights are kept and gathered in fp8."""
    cuda_graphs: list[str] = field(default_factory=list)
    """Modules in CUDA graphs, by Megatron's ``cuda_graph_scope``."""
    precision_aware: bool = False
    moment_dtype: Literal["fp32", "bf16"] = "fp32"
    grad_dtype: Literal["fp32", "bf16"] = "fp32"
    grad_overlap: bool = True
    """Whether gradient reduction and parameter gather overlap compute."""
    stages: str | None = None
    """Megatron's pipeline layout, where layers are not dealt evenly."""
    attention_flops: Literal["full", "causal"] = "causal"
    """What part of the attention matrix the source's FLOPs count."""
    peak_tflops: float | None = None
    """Peak that an `mfu` is a share of."""
    seconds: float | None = None
    """Seconds of a step, where the source states them beside `figure`."""
    assumed: dict[str, str] = field(default_factory=dict)
    """What the source does not state, and what was taken for it."""
    held_out: bool = False
    """Scored, but no constant is fitted to it."""
    unscored: str = ""
    """Why no prediction is judged by it; empty where it is scored."""

    @property
    def scored(self) -> bool:
        """Whether predictions are judged by it."""
        return not self.unscored


@dataclass(frozen=True)
class Entry:
    """A row with what it refers to."""

    run: Run
    model: Model
    source: Source
    file: str


@cache
def models() -> dict[str, Model]:
    """All models by key."""
    return TypeAdapter(dict[str, Model]).validate_python(_yaml(FOLDER / MODELS))


@cache
def entries() -> tuple[Entry, ...]:
    """All rows of all files, scored ones of a file first.

    Raises:
        ValueError: a file with an unknown key, a value of another type, or two rows of one name.
    """
    results: list[Entry] = []
    for path in sorted(FOLDER.glob("*.yaml")):
        if path.name == MODELS:
            continue
        content = _yaml(path)
        source = TypeAdapter(Source).validate_python(content["source"])
        for row in content["runs"]:
            values = content["defaults"] | row
            values["assumed"] = content["defaults"].get("assumed", {}) | row.get("assumed", {})
            values["global_"] = values.pop("global")
            if values["dtype"] != "fp8":
                values.pop("fp8_recipe", None)
            run = TypeAdapter(Run).validate_python(values)
            results.append(Entry(run, models()[run.model], source, path.name))
    names = [one.run.id for one in results]
    if len(set(names)) < len(names):
        raise ValueError(f"two rows of one name among {sorted(names)}")
    return tuple(results)


def scored() -> tuple[Entry, ...]:
    """The rows that predictions are judged by."""
    return tuple(one for one in entries() if one.run.scored)


def entry(name: str) -> Entry:
    """The row of one name."""
    return next(one for one in entries() if one.run.id == name)


def _yaml(path: Path) -> Any:
    # YAML 1.1 reads 46.7e9 as text; pydantic makes a number of it.
    return yaml.safe_load(path.read_text())
