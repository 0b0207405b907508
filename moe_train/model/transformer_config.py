"""Megatron's TransformerConfig, OptimizerConfig and DDP config from ours.

``megatron.*`` overrides are applied last. ``recompute.layers`` is not here: Megatron cannot express
a list of layers, see `moe_train.model.spec.Layer`.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_train.errors import ConfigError
from moe_train.features.balancing import BALANCING
from moe_train.features.dispatchers import DISPATCHERS
from moe_train.features.optimizers import OPTIMIZERS, Optimizer

if TYPE_CHECKING:
    from moe_train.backend.protocol import Backend
    from moe_train.config.root import Config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def transformer_config(
    config: Config, backend: Backend, *, sequence_parallel: bool = True
) -> TransformerConfig:
    """TransformerConfig of a resolved config (every parallel size filled).

    Args:
        sequence_parallel: whether tensor-parallel ranks split sequences between layers.

    Raises:
        ConfigError: Megatron itself refuses the combination.
    """
    model, parallel, recompute = config.model, config.parallel, config.recompute
    assert parallel.tensor and parallel.pipeline and parallel.context and parallel.expert
    dtype = DTYPES[config.dtype]
    fields: dict[str, Any] = dict(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        qk_layernorm=model.qk_norm != "none",
        ffn_hidden_size=model.expert_hidden,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=sequence_parallel and parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=_chunks(parallel.virtual_pipeline),
        context_parallel_size=parallel.context,
        # Spanning experts are not inside one stage, so Megatron sees only the part of the expert
        # group that lies inside a stage: its expert-data-parallel groups are then right.
        expert_model_parallel_size=parallel.tensor if parallel.span else parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        overlap_p2p_comm=_chunks(parallel.virtual_pipeline) is not None,
        batch_p2p_comm=_chunks(parallel.virtual_pipeline) is None,
        # The cross-stage dispatcher has an overlap of its own.
        overlap_moe_expert_parallel_comm=parallel.overlap_expert_comm and not parallel.span,
        deallocate_pipeline_outputs=True,
        **_moe_fields(config),
    )
    if config.dtype == "fp8":
        fields.update(fp8="hybrid", fp8_recipe="delayed")
    if recompute.modules:
        fields.update(recompute_granularity="selective", recompute_modules=list(recompute.modules))
    fields.update(backend.transformer_overrides())
    return _build(TransformerConfig, fields, config.megatron.transformer, "transformer")


def _chunks(virtual_pipeline: int | None) -> int | None:
    return virtual_pipeline if virtual_pipeline and virtual_pipeline > 1 else None


def _moe_fields(config: Config) -> dict[str, Any]:
    model, router = config.model, config.model.router
    balancing = BALANCING[router.balancing]
    return {
        "num_moe_experts": model.experts,
        "moe_ffn_hidden_size": model.expert_hidden,
        "moe_shared_expert_intermediate_size": model.shared_expert_hidden or None,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": DISPATCHERS[config.parallel.dispatcher].megatron,
        "moe_router_topk": model.experts_per_token,
        "moe_router_load_balancing_type": balancing.megatron,
        "moe_aux_loss_coeff": router.aux_coeff if balancing.weighted else 0.0,
        "moe_z_loss_coeff": router.z_coeff or None,
        "moe_router_score_function": router.score,
        "moe_router_enable_expert_bias": router.expert_bias,
        "moe_router_bias_update_rate": router.expert_bias_rate,
        "moe_router_dtype": "fp32",
        "moe_router_num_groups": router.groups,
        "moe_router_group_topk": router.groups_per_token,
        "moe_router_pre_softmax": router.pre_softmax,
        "moe_router_topk_scaling_factor": router.scaling_factor,
        "moe_router_force_load_balancing": router.force_balance,
        "moe_expert_capacity_factor": router.capacity_factor,
        "moe_token_drop_policy": router.drop_policy,
        "moe_pad_expert_input_to_capacity": router.pad_to_capacity,
    }


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """DistributedDataParallelConfig of a resolved config."""
    fields = {
        "grad_reduce_in_fp32": config.optim.grad_dtype == "fp32",
        # A spanning rank's experts finish their backward passes at different ticks for
        # different stages, so their gradients are reduced after the flush.
        "overlap_grad_reduce": config.parallel.overlap_grad_reduce and not config.parallel.span,
        "overlap_param_gather": config.parallel.overlap_param_gather,
        "use_distributed_optimizer": config.optim.distributed,
        # Non-finite values are agreed on by all ranks before the optimizer, in our own step.
        "check_for_nan_in_grad": False,
    }
    return _build(DistributedDataParallelConfig, fields, config.megatron.ddp, "ddp")


@dataclasses.dataclass
class NamedOptimizerConfig(OptimizerConfig):
    """Megatron's OptimizerConfig and the descriptor that it was made from."""

    descriptor: Optimizer = OPTIMIZERS["adamw"]


def optimizer_config(config: Config, backend: Backend) -> NamedOptimizerConfig:
    """OptimizerConfig of a resolved config."""
    optim = config.optim
    descriptor = OPTIMIZERS[optim.name]
    fields: dict[str, Any] = {
        "descriptor": descriptor,
        # Whatever is built stands in the place of Adam, see `patches.optimizer_built_by`.
        "optimizer": "adam",
        **descriptor.megatron_fields,
        "lr": optim.lr,
        "decoupled_lr": optim.embedding_lr,
        "min_lr": optim.min_lr,
        "weight_decay": optim.weight_decay,
        "clip_grad": optim.clip,
        "bf16": DTYPES[config.dtype] is torch.bfloat16,
        "params_dtype": DTYPES[config.dtype],
        "use_distributed_optimizer": optim.distributed,
        "use_precision_aware_optimizer": optim.precision_aware,
        "overlap_param_gather": config.parallel.overlap_param_gather,
        "optimizer_cpu_offload": optim.offload,
    }
    if not descriptor.build:
        keys = descriptor.hyper_parameters
        fields.update({field: getattr(optim, key) for field, key in keys.items()})
    if optim.precision_aware:
        fields.update(
            main_grads_dtype=DTYPES[optim.grad_dtype],
            exp_avg_dtype=DTYPES[optim.moment_dtype],
            exp_avg_sq_dtype=DTYPES[optim.moment_dtype],
        )
    fields.update(backend.optimizer_overrides())
    with backend.optimizer_construction():
        return _build(NamedOptimizerConfig, fields, config.megatron.optimizer, "optimizer")


def _enums(kind: type) -> dict[str, type[enum.Enum]]:
    """Fields of a Megatron dataclass that take an enum alone, or null; configs name its members."""
    enums = {}
    for field, annotation in get_type_hints(kind).items():
        match [one for one in get_args(annotation) or (annotation,) if one is not type(None)]:
            case [type() as one] if issubclass(one, enum.Enum):
                enums[field] = one
    return enums


def _build(kind: type, fields: dict[str, Any], extra: dict[str, Any], name: str) -> Any:
    legal = {field.name for field in dataclasses.fields(kind)}
    if unknown := set(extra) - legal:
        raise ConfigError(f"megatron.{name}.{sorted(unknown)[0]}", f"no field of {kind.__name__}")
    merged = {**fields, **extra}
    enums = _enums(kind)
    for key, value in merged.items():
        if key in enums and isinstance(value, str):
            if value not in (names := enums[key].__members__):
                raise ConfigError(
                    f"megatron.{name}.{key}", f"{value!r} is unknown", f"one of {', '.join(names)}"
                )
            merged[key] = enums[key][value]
        if key.endswith("dtype") and isinstance(value, str) and value in DTYPES:
            merged[key] = DTYPES[value] if not key.startswith("moe_") else value
    try:
        return kind(**merged)
    except (AssertionError, ValueError, NotImplementedError, TypeError, RuntimeError) as refusal:
        raise ConfigError(
            f"megatron.{name}",
            f"Megatron-Core's {kind.__name__} refuses this: {refusal}",
            "change the option it names, or drop the megatron.* override",
        ) from refusal
