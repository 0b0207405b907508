"""What the kernels of a machine cannot do: the rules that a layout alone does not show.

Two machines are known: the host (torch's own kernels) and an accelerator with
TransformerEngine. Megatron-Core's sources for the second are ``TransformerConfig.__post_init__``
(0.19); TransformerEngine's is ``assert_dim_for_fp8_exec`` (2.x): widths in multiples of 16,
rows in multiples of 8.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_train.config.root import Config
from moe_train.errors import ConfigError
from moe_train.plan.layouts.layout import Layout
from moe_train.plan.quantities.shapes import DTYPE_BYTES

GROUPED_ALIGNMENT = 16
"""Bytes that the rows of ``torch._grouped_mm``'s operands are multiples of (torch 2.13)."""

FP8_WIDTH, FP8_ROWS = 16, 8


def host_options(config: Config) -> Iterator[ConfigError]:
    """Options that the host backend does not have."""
    if config.dtype == "fp8":
        yield ConfigError("dtype", "fp8 needs TransformerEngine on a GPU", "dtype=bf16 or fp32")
    if config.parallel.dispatcher == "flex":
        yield ConfigError("parallel.dispatcher", "flex needs a GPU", "parallel.dispatcher=alltoall")
    if config.optim.offload:
        yield ConfigError("optim.offload", "there is no GPU to offload from", "optim.offload=false")


def host_sizes(config: Config, layout: Layout) -> Iterator[ConfigError]:
    """Sizes that the host's kernels cannot take."""
    if layout.context > 1:
        yield ConfigError(
            "parallel.context",
            f"{layout.context}: attention over parts of a sequence is TransformerEngine's, "
            "on a GPU",
            "parallel.context=1",
        )
    if config.dtype == "fp8":
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
                             "the host's grouped matrix product takes rows of "
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
    head_dim = model.head_dim or model.hidden // model.heads
    kv_heads = model.kv_heads or model.heads
    why = f"fp8 products are {FP8_WIDTH} wide"
    for field, value, parts in (
        ("model.hidden", model.hidden, 1),
        ("model.head_dim", model.heads * head_dim, tensor),
        ("model.kv_heads", (model.heads + 2 * kv_heads) * head_dim, tensor),
        ("model.expert_hidden", model.expert_hidden, layout.expert_tensor),
        ("model.shared_expert_hidden", model.shared_expert_hidden, tensor),
    ):
        # What tensor parallelism does not divide is told by its own rule.
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
