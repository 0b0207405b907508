"""What the kernels of a machine cannot do: the rules that a layout alone does not show.

What a kernel set has is in its descriptor (`moe_train.config.kernels`). Megatron-Core's sources
for TransformerEngine are ``TransformerConfig.__post_init__`` (0.19); TransformerEngine's is
``assert_dim_for_fp8_exec`` (2.x): widths in multiples of 16, rows in multiples of 8.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.config.kernels import KernelSet
from moe_train.config.root import Config
from moe_train.errors import ConfigError
from moe_train.features.dispatchers import DISPATCHERS
from moe_train.parallel.layout import Layout
from moe_train.parallel.shapes import DTYPE_BYTES

GROUPED_ALIGNMENT = 16
"""Bytes that the rows of ``torch._grouped_mm``'s operands are multiples of (torch 2.13)."""

FP8_WIDTH, FP8_ROWS = 16, 8


def kernel_options(config: Config, kernels: KernelSet, on_cpu: bool) -> Iterator[ConfigError]:
    """Options that the kernels, or a machine without a GPU, do not have."""
    where = "on a GPU" if on_cpu else "(backend.kernels=te)"
    if on_cpu and config.backend.kernels == "te":
        yield ConfigError(
            "backend.kernels",
            "te: TransformerEngine has no kernels for a CPU",
            "backend.kernels=auto or torch",
        )
    if on_cpu and config.backend.compile:
        yield ConfigError(
            "backend.compile",
            "true: compiled functions round otherwise on a CPU, where runs are bitwise the same",
            "backend.compile=false",
        )
    if config.dtype == "fp8" and not kernels.fp8:
        yield ConfigError("dtype", f"fp8 needs TransformerEngine {where}", "dtype=bf16 or fp32")
    dispatcher = DISPATCHERS[config.parallel.dispatcher]
    if dispatcher.fused_permutation and not kernels.fused_permutation:
        needs = "a GPU" if on_cpu else "TransformerEngine's permutation (backend.kernels=te)"
        yield ConfigError(
            "parallel.dispatcher",
            f"{dispatcher.name} needs {needs}",
            "parallel.dispatcher=alltoall",
        )
    for setting in kernels.ignored:
        value = config.megatron.transformer.get(setting.field, setting.value)
        if value != setting.value:
            yield ConfigError(
                f"megatron.transformer.{setting.field}",
                f"{value}: the {kernels.name} kernels have no such option: {setting.why}",
                f"leave it at {setting.value}, or use TransformerEngine's kernels {where}",
            )
    if on_cpu and config.optim.offload:
        yield ConfigError("optim.offload", "there is no GPU to offload from", "optim.offload=false")


def kernel_sizes(
    config: Config, layout: Layout, kernels: KernelSet, on_cpu: bool
) -> Iterator[ConfigError]:
    """Sizes that the kernels cannot take."""
    if layout.context > 1 and not kernels.context:
        yield ConfigError(
            "parallel.context",
            f"{layout.context}: attention over parts of a sequence is TransformerEngine's, "
            + ("on a GPU" if on_cpu else "and the kernels are torch's"),
            "parallel.context=1" if on_cpu else "parallel.context=1 or backend.kernels=te",
        )
    if config.dtype == "fp8" or kernels.name != "torch":
        return
    model, bytes_ = config.model, DTYPE_BYTES[config.dtype]
    unit = GROUPED_ALIGNMENT // bytes_
    for field, width in (
        ("model.hidden", model.hidden),
        ("model.expert_hidden", model.expert_hidden // layout.expert_tensor),
    ):
        if width % unit:
            parts = layout.expert_tensor if field.endswith("expert_hidden") else 1
            yield _unaligned(field, getattr(model, field[6:]), unit * parts,
                             "torch's grouped matrix product takes rows of "
                             f"{GROUPED_ALIGNMENT} bytes")  # fmt: skip


def _unaligned(field: str, value: int, unit: int, why: str) -> ConfigError:
    below = value // unit * unit
    legal = [size for size in (below, below + unit) if size]
    return ConfigError(field, f"{value} is not a multiple of {unit}: {why}", f"nearest: {legal}")


def fp8_faults(config: Config, layout: Layout) -> Iterator[ConfigError]:
    """What fp8 asks of options and sizes, wherever it runs."""
    if config.dtype != "fp8":
        return
    recipe = config.megatron.transformer.get("fp8_recipe", "delayed")
    refused = sorted(set(config.recompute.modules) & {"moe_act", "layernorm"})
    if refused and recipe == "delayed":
        yield ConfigError(
            "recompute.modules",
            f"{', '.join(refused)}: fp8 with delayed scaling does not recompute this",
            "drop it, or megatron.transformer.fp8_recipe=tensorwise",
        )
    model, tensor = config.model, layout.tensor
    why = f"fp8 products are {FP8_WIDTH} wide"
    for field, value, parts in (
        ("model.hidden", model.hidden, 1),
        ("model.head_dim", model.query_width, tensor),
        ("model.kv_heads", model.query_width + 2 * model.kv_width, tensor),
        ("model.expert_hidden", model.expert_hidden, layout.expert_tensor),
        ("model.shared_expert_hidden", model.shared_expert_hidden, tensor),
    ):
        # The rule of tensor parallelism refuses what it does not divide.
        if value % parts == 0 and value // parts % FP8_WIDTH:
            yield ConfigError(
                field,
                f"leaves {value // parts} columns on a rank, and {why}",
                f"a multiple of {FP8_WIDTH}",
            )
    rows = config.batch.micro * config.data.sequence // (layout.context * tensor)
    if rows % FP8_ROWS:
        yield ConfigError(
            "data.sequence",
            f"leaves {rows} tokens of a micro-batch on a rank, and fp8 products have rows in "
            f"multiples of {FP8_ROWS}",
            "make batch.micro x data.sequence / (parallel.tensor x parallel.context) one",
        )
