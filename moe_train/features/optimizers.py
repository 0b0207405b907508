"""Optimizers: hyper-parameters, state tensors per parameter, and what Megatron can do with each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Optimizer:
    """One value of ``optim.name``."""

    name: str
    about: str
    state_names: tuple[str, ...]
    """Tensors that it keeps of each parameter, as the torch optimizer names them; the fp32 master
    copy of a 16-bit parameter is Megatron's and comes on top."""
    megatron_fields: Mapping[str, object] = field(default_factory=dict)
    """Fields of OptimizerConfig with fixed values."""
    hyper_parameters: Mapping[str, str] = field(default_factory=dict)
    """Keys of ``optim`` by argument: of OptimizerConfig, or of `build`."""
    build: str = ""
    """``module:class`` of a torch optimizer; empty for Megatron's own Adam."""
    constants: Mapping[str, object] = field(default_factory=dict)
    """Fixed arguments of `build`."""
    precision_aware: bool = False
    """Whether it keeps moments in 16 bits and its own master copy (optim.precision_aware)."""
    offload: bool = False
    """Whether Megatron can run it on the CPU (optim.offload)."""


_ADAM = {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_eps": "eps"}

OPTIMIZERS = {
    one.name: one
    for one in (
        Optimizer(
            name="adamw",
            about="Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101)",
            state_names=("exp_avg", "exp_avg_sq"),
            megatron_fields={"decoupled_weight_decay": True},
            hyper_parameters=_ADAM,
            precision_aware=True,
            offload=True,
        ),
        Optimizer(
            name="adam",
            about="Adam with L2 regularisation (Kingma and Ba, arXiv:1412.6980)",
            state_names=("exp_avg", "exp_avg_sq"),
            megatron_fields={"decoupled_weight_decay": False},
            hyper_parameters=_ADAM,
            precision_aware=True,
        ),
        Optimizer(
            name="sgd",
            about="SGD with momentum and L2 regularisation, as torch.optim.SGD has them",
            state_names=("momentum_buffer",),
            build="torch.optim:SGD",
            hyper_parameters={"momentum": "momentum"},
            constants={"fused": True},
        ),
    )
}
