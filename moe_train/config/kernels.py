"""Kernel sets: TransformerEngine's and torch's, with what each fuses and supports.

One descriptor each, without torch: backends set Megatron's fields from it, legality checks what it
supports, the plan shows it.
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
    """One field of Megatron's TransformerConfig that depends on the kernels, and the reason."""

    field: str
    value: Any
    why: str


@dataclass(frozen=True)
class KernelSet:
    """Kernels that are used together."""

    name: str
    about: str
    transformer_impl: str
    """Megatron's name of the spec provider that the set belongs to."""
    settings: tuple[Setting, ...]
    fp8: bool
    """Whether it has fp8 products."""
    context: bool
    """Whether its attention supports context parallelism."""
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
        Setting("apply_rope_fusion", True, "one kernel each for queries and keys"),
        Setting("moe_permute_fusion", True, "no index tensors and no sort before the experts"),
        Setting("moe_router_fusion", True, "top-k, scores and auxiliary loss in one kernel each"),
        Setting("cross_entropy_loss_fusion", True, "two all-reduces instead of three"),
        Setting(
            "cross_entropy_fusion_impl",
            "native",
            "Megatron warns that TransformerEngine's own is unstable",
        ),
        Setting("bias_activation_fusion", True, "SwiGLU saves only its input for backward"),
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
        Setting("apply_rope_fusion", False, "the kernel is in TransformerEngine"),
        Setting("moe_permute_fusion", False, "the kernel is in TransformerEngine"),
        Setting("moe_router_fusion", False, "the kernel is in TransformerEngine"),
        Setting(
            "cross_entropy_loss_fusion",
            False,
            "uncompiled it fuses nothing, and CPU and GPU then compute the loss by the same lines",
        ),
        Setting("cross_entropy_fusion_impl", "native", "TransformerEngine's is not available"),
        Setting("bias_activation_fusion", True, "SwiGLU saves only its input for backward"),
        Setting("bias_dropout_fusion", True, "a function of Megatron without a kernel"),
        Setting("gradient_accumulation_fusion", False, "the kernel is in Apex"),
        Setting("persist_layer_norm", False, "the kernel is in Apex"),
        Setting("masked_softmax_fusion", False, "attention is one kernel without it"),
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
    """The kernel set of a run, and the reason."""

    kernels: KernelSet
    why: str


def expected_kernels(requested: str, *, on_cpu: bool, here: bool = False) -> KernelChoice:
    """The kernel set that a run will use, as far as is known without importing it.

    Args:
        requested: ``backend.kernels``.
        on_cpu: whether the run is on CPUs, which use torch's kernels.
        here: whether the run is on this machine, so that ``auto`` checks for TransformerEngine;
            a plan for other hardware assumes it.
    """
    if on_cpu:
        return KernelChoice(TORCH, "the only kernels for CPUs")
    if requested != "auto":
        return KernelChoice(KERNEL_SETS.get(requested, TORCH), f"backend.kernels={requested}")
    if not here:
        return KernelChoice(TE, "auto: assumed; torch where TransformerEngine does not import")
    if transformer_engine_installed():
        return KernelChoice(TE, "auto: TransformerEngine is installed")
    return KernelChoice(TORCH, "auto: TransformerEngine is not installed")


def expected_kernels_on(requested: str, hardware: HardwareConfig) -> KernelChoice:
    """The kernel set that a plan assumes on ``hardware``.

    A profile that was chosen by this machine's devices (it has their name) is for this interpreter,
    so ``auto`` checks whether TransformerEngine is installed.
    """
    on_cpu = hardware.kind != "accelerator"
    return expected_kernels(requested, on_cpu=on_cpu, here=bool(hardware.device))


def transformer_engine_installed() -> bool:
    """Whether TransformerEngine is installed; whether it imports is known only at the start."""
    return importlib.util.find_spec(TRANSFORMER_ENGINE) is not None
