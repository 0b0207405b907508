"""The two kernel sets, TransformerEngine's and torch's own: what each fuses and what each lacks.

One descriptor each, without torch: backends build Megatron's fields from it, legality reads what
it cannot do, the plan shows it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from moe_train.config.hardware import HardwareConfig

TRANSFORMER_ENGINE = "transformer_engine"
"""Top-level package of TransformerEngine."""


@dataclass(frozen=True)
class Setting:
    """One field of Megatron's TransformerConfig that the kernels decide, and why so."""

    field: str
    value: Any
    why: str


@dataclass(frozen=True)
class KernelSet:
    """Kernels that belong together."""

    name: str
    about: str
    transformer_impl: str
    """Megatron's name of the spec provider that the set belongs to."""
    settings: tuple[Setting, ...]
    fp8: bool
    """Whether it multiplies in fp8."""
    context: bool
    """Whether its attention works on parts of a sequence (context parallelism)."""
    fused_permutation: bool
    """Whether dispatchers that need TransformerEngine's permutation (flex) find it."""
    ignored: tuple[Setting, ...] = ()
    """Fields of TransformerConfig that these kernels do not read, with Megatron's default."""

    def overrides(self) -> dict[str, Any]:
        """The settings, as TransformerConfig's fields."""
        fields = {setting.field: setting.value for setting in self.settings}
        return {"transformer_impl": self.transformer_impl, **fields}


TE = KernelSet(
    name="te",
    about="TransformerEngine: fused attention, norms, grouped experts, Adam; fp8",
    transformer_impl="transformer_engine",
    settings=(
        Setting("apply_rope_fusion", True, "rotates queries and keys in one kernel each"),
        Setting("moe_permute_fusion", True, "no index tensors and no sort on the way to experts"),
        Setting("moe_router_fusion", True, "top-k, scores and auxiliary loss in one kernel each"),
        Setting("cross_entropy_loss_fusion", True, "two all-reduces instead of three"),
        Setting(
            "cross_entropy_fusion_impl",
            "native",
            "Megatron warns that TransformerEngine's own is unstable",
        ),
        Setting("bias_activation_fusion", True, "SwiGLU keeps its input alone for the backward"),
        Setting("bias_dropout_fusion", True, "the residual addition is one kernel"),
        Setting(
            "gradient_accumulation_fusion",
            True,
            "weight gradients are added to the buffer by the product itself; Megatron's own head "
            "does so where Apex is installed",
        ),
    ),
    fp8=True,
    context=True,
    fused_permutation=True,
)

TORCH = KernelSet(
    name="torch",
    about="torch alone: RMSNorm, scaled_dot_product_attention, grouped experts, Adam",
    transformer_impl="local",
    settings=(
        Setting("apply_rope_fusion", False, "the kernel is TransformerEngine's"),
        Setting("moe_permute_fusion", False, "the kernel is TransformerEngine's"),
        Setting("moe_router_fusion", False, "the kernel is TransformerEngine's"),
        Setting(
            "cross_entropy_loss_fusion",
            False,
            "uncompiled it fuses nothing, and CPU and GPU then compute the loss by the same lines",
        ),
        Setting("cross_entropy_fusion_impl", "native", "TransformerEngine's is not there"),
        Setting("bias_activation_fusion", True, "SwiGLU keeps its input alone for the backward"),
        Setting("bias_dropout_fusion", True, "a function of Megatron's own that needs no kernel"),
        Setting("gradient_accumulation_fusion", False, "the kernel is Apex's"),
        Setting("persist_layer_norm", False, "the kernel is Apex's"),
        Setting("masked_softmax_fusion", False, "attention is one kernel anyway"),
    ),
    fp8=False,
    context=False,
    fused_permutation=False,
    ignored=(
        Setting("softmax_type", "vanilla", "scaled_dot_product_attention has no softmax offset"),
        Setting("window_size", None, "attention is causal over the whole sequence"),
        Setting("layernorm_zero_centered_gamma", False, "torch's RMSNorm scales by its weight"),
        Setting("qk_clip", False, "scaled_dot_product_attention returns no attention logits"),
        Setting(
            "log_max_attention_logit",
            False,
            "scaled_dot_product_attention returns no attention logits",
        ),
    ),
)

KERNEL_SETS = {kernels.name: kernels for kernels in (TE, TORCH)}


@dataclass(frozen=True)
class KernelChoice:
    """The set that ``backend.kernels`` leads to, and the reason in a clause."""

    kernels: KernelSet
    why: str


def planned_kernels(requested: str, *, on_cpu: bool, here: bool = False) -> KernelChoice:
    """The set that a run would take, as far as is known without importing anything.

    Args:
        requested: ``backend.kernels``.
        on_cpu: whether the run has no GPU; kernels are torch's there.
        here: whether the run is for this machine, so that ``auto`` looks for TransformerEngine;
            a plan for other hardware assumes it.
    """
    if on_cpu:
        return KernelChoice(TORCH, "the only kernels of a CPU")
    if requested != "auto":
        return KernelChoice(KERNEL_SETS.get(requested, TORCH), f"backend.kernels={requested}")
    if not here:
        return KernelChoice(TE, "auto: assumed; torch where TransformerEngine does not import")
    if transformer_engine_installed():
        return KernelChoice(TE, "auto: TransformerEngine is installed")
    return KernelChoice(TORCH, "auto: TransformerEngine is not installed")


def run_kernels(requested: str, hardware: HardwareConfig) -> KernelChoice:
    """The set that a plan prices and shows for a run on ``hardware``'s devices.

    A profile that was found on this machine (it names the device) stands for this interpreter, so
    ``auto`` looks whether TransformerEngine is installed here.
    """
    on_cpu = hardware.kind != "accelerator"
    return planned_kernels(requested, on_cpu=on_cpu, here=bool(hardware.device))


def transformer_engine_installed() -> bool:
    """Whether this interpreter has TransformerEngine; that it imports shows only at the start."""
    return importlib.util.find_spec(TRANSFORMER_ENGINE) is not None
