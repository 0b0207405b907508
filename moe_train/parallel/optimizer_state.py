"""Bytes of weights, gradients and optimizer state per parameter, and who holds which share.

    plain mixed precision     2 weights + 4 gradients + 4 master + 4 + 4 moments = 18
    precision-aware           2 weights + 2 gradients + 4 master + 2 + 2 moments = 12
    fp32                      4 weights + 4 gradients + 4 + 4 moments            = 16

Master copy and moments ("optimizer state") are divided over data-parallel replicas by the
distributed optimizer: over DP x CP for dense parameters, over expert-DP for experts. Weights and
gradient buffers are whole on every rank. Source: Megatron-Core 0.19, ``DistributedOptimizer`` and
``_ParamAndGradBuffer``; Rajbhandari et al., arXiv:1910.02054 (ZeRO stage 1).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from moe_train.config.root import Config
from moe_train.config.training import OptimConfig
from moe_train.features.optimizers import OPTIMIZERS
from moe_train.parallel.layout import Layout
from moe_train.parallel.parameters import RankParameters
from moe_train.parallel.shapes import DTYPE_BYTES

WIDTH = {"fp32": 4, "bf16": 2}
"""Bytes of a dtype that state can be kept in."""


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes per parameter, before sharding."""

    weight: int
    gradient: int
    master: int
    """fp32 copy of a 16-bit weight; 0 for fp32 weights."""
    moments: int
    """All state tensors of the optimizer's descriptor: Adam's two moments."""

    @property
    def state(self) -> int:
        """What the distributed optimizer shards and offloading moves away."""
        return self.master + self.moments

    @property
    def total(self) -> int:
        """All of it, on one replica."""
        return self.weight + self.gradient + self.state


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    host: int = 0
    """Optimizer state kept in the host's memory instead (``optim.offload``)."""

    @property
    def device(self) -> int:
        """Bytes in device memory."""
        return self.weights + self.gradients + self.optimizer


def bytes_per_parameter(dtype: str, optim: OptimConfig) -> ParameterBytes:
    """Widths of weights, gradients and state for a compute dtype and optimizer."""
    weight = DTYPE_BYTES[dtype]
    moment = WIDTH[optim.moment_dtype] if optim.precision_aware else 4
    return ParameterBytes(
        weight=weight,
        gradient=WIDTH[optim.grad_dtype],
        master=4 if weight < 4 else 0,
        moments=len(OPTIMIZERS[optim.name].state_names) * moment,
    )


def owned_parameters(config: Config, layout: Layout, held: RankParameters) -> int:
    """Parameters that a rank updates: its shard with the distributed optimizer, else all `held`."""
    if not config.optim.distributed:
        return held.total
    dense = -(-held.dense // (layout.data * layout.context))
    return dense - (-held.experts // layout.expert_data)


def state_bytes(config: Config, layout: Layout, held: RankParameters) -> StateBytes:
    """Weights, gradients and optimizer state of a rank that holds `held`.

    Without the padding of buffers to multiples of a few hundred elements per replica.
    """
    each, optim = bytes_per_parameter(config.dtype, config.optim), config.optim
    state = owned_parameters(config, layout, held) * each.state
    return StateBytes(
        weights=held.total * each.weight,
        gradients=held.total * each.gradient,
        optimizer=0 if optim.offload else state,
        host=state if optim.offload else 0,
    )


def variants(config: Config) -> dict[str, tuple[Config, str]]:
    """Forms of AdamW to compare a plan under: name -> (config, overrides that choose it)."""
    sixteen = config.dtype != "fp32"
    adamw = "" if config.optim.name == "adamw" else "optim.name=adamw "
    choices: dict[str, tuple[dict[str, object], str]] = {
        "plain Adam": (
            {"distributed": False, "precision_aware": False, "moment_dtype": "fp32",
                 "grad_dtype": "fp32", "offload": False},
            "optim.distributed=false optim.precision_aware=false optim.moment_dtype=fp32 "
            "optim.grad_dtype=fp32",
        ),
        "distributed": (
            {"distributed": True, "precision_aware": False, "moment_dtype": "fp32",
                 "grad_dtype": "fp32", "offload": False},
            "optim.distributed=true optim.precision_aware=false optim.moment_dtype=fp32 "
            "optim.grad_dtype=fp32",
        ),
        "precision-aware": (
            {"distributed": True, "precision_aware": True, "moment_dtype": "bf16",
                 "grad_dtype": "bf16" if sixteen else "fp32", "offload": False},
            "optim=precision_aware",
        ),
        "offloaded": (
            {"distributed": True, "precision_aware": False, "moment_dtype": "fp32",
                 "grad_dtype": "bf16" if sixteen else "fp32", "offload": True},
            "optim.distributed=true optim.precision_aware=false optim.moment_dtype=fp32 "
            "optim.offload=true",
        ),
    }  # fmt: skip
    return {
        name: (
            dataclasses.replace(
                config,
                optim=dataclasses.replace(config.optim, name="adamw", **changes),  # type: ignore[arg-type]
            ),
            adamw + overrides,
        )
        for name, (changes, overrides) in choices.items()
    }
