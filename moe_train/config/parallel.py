"""Config groups of parallelism, activation recomputation and batch sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from moe_train.config.types import (
    Batch,
    Bool,
    DispatcherName,
    Placement,
    PositiveInteger,
    ScheduleName,
    Text,
)
from moe_train.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel sizes; data parallelism takes the remaining ranks."""

    auto: Bool = False
    """Choose the sizes that are null by predicted speed and memory."""
    reference: Text = ""
    """Layout such as TP2.PP4.EP8.span, taken by ``auto`` on as many ranks as it has."""
    tensor: PositiveInteger | None = None
    """Tensor-parallel ranks of the dense parts; above 1, sequence parallelism is on."""
    pipeline: PositiveInteger | None = None
    """Pipeline stages."""
    virtual_pipeline: PositiveInteger | None = None
    """Model chunks per stage (interleaved 1F1B); null or 1 is plain 1F1B."""
    schedule: ScheduleName = "auto"
    """Pipeline schedule; auto is the one of virtual_pipeline and placement."""
    stages: Text = ""
    """Layers of each chunk of each stage in Megatron's notation, such as Ett|(ttt|)*6tL (E
    embedding, t layer, m multi-token prediction, L loss); empty deals them evenly. Planned only."""
    context: PositiveInteger | None = None
    """Context-parallel ranks: each holds part of every sequence."""
    expert: PositiveInteger | None = None
    """Expert-parallel ranks: each holds experts / expert of a layer's experts."""
    expert_tensor: PositiveInteger | None = None
    """Tensor-parallel ranks inside each expert."""
    placement: Placement | None = None
    """Ranks that hold a layer's experts: of its pipeline stage, or of all stages (span)."""
    dispatcher: DispatcherName = "alltoall"
    """How tokens reach their experts; flex is DeepEP, on CUDA only."""
    overlap_expert_comm: Bool = False
    """Overlap the expert all-to-all with compute (stage: Megatron's combined 1F1B, bf16; span: the
    forward and backward pass of a tick alternate)."""
    overlap_grad_reduce: Bool = True
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: Bool = False
    """Gather updated parameters while the next forward pass runs (optim.distributed)."""

    @property
    def span(self) -> bool:
        """Whether experts are placed over all pipeline stages of a replica."""
        return self.placement == "span"


_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")

RecomputeModule = Literal[
    "core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"
]


@dataclass(frozen=True)
class RecomputeConfig:
    """Activations that the backward pass recomputes instead of saving them."""

    layers: Text = "none"
    """Layers that are recomputed as a whole: none | all | 1-based ranges such as 2-15 or 1,4-6."""
    modules: list[RecomputeModule] = field(default_factory=list)
    """Modules that Megatron recomputes selectively, in every layer."""

    def selected(self, count: int) -> frozenset[int]:
        """The 1-based layers that `layers` selects out of `count`.

        Raises:
            ConfigError: bad syntax, or a layer outside 1..count.
        """
        if self.layers in ("none", "all"):
            return frozenset(range(1, count + 1) if self.layers == "all" else ())
        field, chosen = "recompute.layers", set[int]()
        for part in self.layers.split(","):
            match = _RANGE.match(part.strip())
            if match is None:
                raise ConfigError(
                    field,
                    f"{self.layers!r} is not a list of layers",
                    f"none, all, or 1-based ranges such as 2-{max(count - 1, 2)} or '1,4-6'",
                )
            first, last = int(match[1]), int(match[2] or match[1])
            if first > last:
                raise ConfigError(field, f"range {part.strip()} runs backwards", f"{last}-{first}")
            if first < 1 or last > count:
                raise ConfigError(
                    field,
                    f"{part.strip()} names a layer outside 1-{count}",
                    f"model.layers={count}: choose within 1-{count}, none or all",
                )
            chosen.update(range(first, last + 1))
        return frozenset(chosen)


@dataclass(frozen=True)
class BatchConfig:
    """Sequences of a micro-batch and of an optimizer step."""

    micro: Batch = 1
    """Sequences per micro-batch and data-parallel replica."""
    microbatches: Batch = 8
    """Micro-batches in flight per accumulation round and replica."""
    accumulation: Batch = 1
    """Rounds per optimizer step; micro-batches per step = microbatches x accumulation."""
    global_: Batch | None = None
    """Sequences per optimizer step over all replicas; when set it fixes the product."""

    def per_step(self, data: int) -> int:
        """Micro-batches per replica and optimizer step, all in one pipeline flush.

        Args:
            data: replicas. Whether they divide ``batch.global`` is `moe_train.parallel.rules`'s to
                check.
        """
        if self.global_ is not None:
            return self.global_ // (self.micro * data)
        return self.microbatches * self.accumulation

    def sequences(self, data: int) -> int:
        """Sequences per optimizer step over all ``data`` replicas."""
        return self.per_step(data) * self.micro * data
