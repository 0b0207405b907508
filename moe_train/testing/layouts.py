"""Layouts of the parity tests, two model sizes, and a cache of their runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moe_train.testing.runs import Run, finished_run

SMALL = [
    "experiment=twin",
    "parallel=single",
    "recompute=none",
    "checkpoint.every=0",
    "train.eval_every=0",
    "train.steps=20",
    "batch.global=4",
    "model.layers=4",
    "model.hidden=64",
    "model.heads=8",
    "model.head_dim=8",
    "model.experts=8",
    "model.expert_hidden=32",
    "data.sequence=64",
    "optim.lr=3e-3",
    "optim.embedding_lr=null",
    "optim.warmup_steps=10",
]
"""4 layers, 8 experts; 256 tokens a step."""

TWIN = [
    "experiment=twin",
    "parallel=single",
    "recompute=none",
    "checkpoint.every=0",
    "train.eval_every=0",
    "train.steps=20",
    "batch.global=8",
]
"""The twin as configured: 16 layers, 64 experts; 1024 tokens a step."""


@dataclass(frozen=True)
class Layout:
    """Parallel sizes for ``world`` ranks."""

    name: str
    world: int = 1
    sizes: dict[str, int] = field(default_factory=dict)
    extra: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """Overrides after those of the model size."""
        return [f"parallel.{name}={size}" for name, size in self.sizes.items()] + [*self.extra]


SPAN = ("parallel.placement=span",)
DISTRIBUTED = ("optim.distributed=true",)

SINGLE = Layout("single")
TP2 = Layout("TP2", 2, {"tensor": 2})
PP2 = Layout("PP2", 2, {"pipeline": 2})
PP4 = Layout("PP4", 4, {"pipeline": 4})
EP2 = Layout("EP2", 2, {"expert": 2})
EP8 = Layout("EP8", 8, {"expert": 8})
TP2_EP2 = Layout("TP2.EP2", 2, {"tensor": 2, "expert": 2})
TP2_PP2_EP2 = Layout("TP2.PP2.EP2", 4, {"tensor": 2, "pipeline": 2, "expert": 2})
TP2_ETP2 = Layout("TP2.ETP2", 2, {"tensor": 2, "expert_tensor": 2})
TP2_ETP2_EP2 = Layout("TP2.ETP2.EP2", 4, {"tensor": 2, "expert_tensor": 2, "expert": 2})
DP2 = Layout("DP2", 2)
DP2_EP2_DISTRIBUTED = Layout("DP2.EP2 distributed optimizer", 2, {"expert": 2}, DISTRIBUTED)
DP2_DISTRIBUTED = Layout("DP2 distributed optimizer", 2, {}, DISTRIBUTED)
PP2_V2 = Layout("PP2 with 2 virtual stages", 2, {"pipeline": 2, "virtual_pipeline": 2})
TP2_PP4_EP2 = Layout("TP2.PP4.EP2", 8, {"tensor": 2, "pipeline": 4, "expert": 2})
PP2_EP2_SPAN = Layout("PP2.EP2 span", 2, {"pipeline": 2, "expert": 2}, SPAN)
TP2_PP2_EP4_SPAN = Layout("TP2.PP2.EP4 span", 4, {"tensor": 2, "pipeline": 2, "expert": 4}, SPAN)
TP2_PP4_EP8_SPAN = Layout("TP2.PP4.EP8 span", 8, {"tensor": 2, "pipeline": 4, "expert": 8}, SPAN)

GRID = [
    TP2,
    PP2,
    PP4,
    EP2,
    EP8,
    TP2_EP2,
    TP2_PP2_EP2,
    TP2_ETP2,
    TP2_ETP2_EP2,
    DP2,
    DP2_EP2_DISTRIBUTED,
    PP2_V2,
    TP2_PP4_EP2,
    PP2_EP2_SPAN,
    TP2_PP2_EP4_SPAN,
    TP2_PP4_EP8_SPAN,
]


class Runs:
    """Finished runs of one model size, each made once and shared by a test session."""

    def __init__(self, folder: Path, base: list[str], timeout: float = 280.0) -> None:
        self.folder, self.base, self.timeout = folder, base, timeout
        self._done: dict[tuple[str, ...], Run] = {}

    def get(self, layout: Layout, *extra: str) -> Run:
        """The run of ``layout`` with more overrides."""
        key = (layout.name, *extra)
        if key not in self._done:
            self._done[key] = self.new(layout, *extra)
        return self._done[key]

    def new(self, layout: Layout, *extra: str, name: str | None = None) -> Run:
        """A new run of ``layout``; a ``name`` used before resumes that run."""
        folder = self.folder / (name or f"run_{len(list(self.folder.glob('run_*.log')))}")
        overrides = [*self.base, *layout.overrides, *extra]
        return finished_run(folder, overrides, layout.world, self.timeout)
