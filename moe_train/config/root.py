"""`Config`: the configuration of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moe_train.config.hardware import HardwareConfig
from moe_train.config.model import ModelConfig
from moe_train.config.parallel import (
    BatchConfig,
    ParallelConfig,
    RecomputeConfig,
)
from moe_train.config.training import (
    BackendConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from moe_train.config.types import Dtype, Text

AUTO = "auto"
"""Value of ``experiment`` and ``device`` that the machine decides."""


@dataclass(frozen=True)
class MegatronConfig:
    """Fields of Megatron-Core's config dataclasses, set over the values that moe_train derives."""

    transformer: dict[Text, Any] = field(default_factory=dict)
    """Fields of megatron.core TransformerConfig."""
    ddp: dict[Text, Any] = field(default_factory=dict)
    """Fields of megatron.core DistributedDataParallelConfig."""
    optimizer: dict[Text, Any] = field(default_factory=dict)
    """Fields of megatron.core OptimizerConfig."""


@dataclass(frozen=True)
class Config:
    """Root of the configuration; one attribute per group."""

    experiment: Text = "custom"
    """Name of the chosen experiment file."""
    experiment_reason: Text = ""
    """Reason for the experiment where experiment=auto chose it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type of all ranks; auto is CUDA where there are GPUs."""
    dtype: Dtype = "fp32"
    """Compute dtype; fp8 needs CUDA with TransformerEngine."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)

    @property
    def recomputed_layers(self) -> frozenset[int]:
        """1-based layers of which the backward pass recomputes the whole forward pass.

        Raises:
            ConfigError: ``recompute.layers`` is malformed or names a layer that does not exist.
        """
        return self.recompute.selected(self.model.layers + self.model.mtp_layers)
