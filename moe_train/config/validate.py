"""Contradictions between config values, whatever the layout and the machine."""

from __future__ import annotations

import re
from collections.abc import Iterable

from moe_train.config.root import Config
from moe_train.config.schema import keys
from moe_train.errors import ConfigError
from moe_train.features.balancing import BALANCING
from moe_train.features.optimizers import OPTIMIZERS

_SIZES = ("model.", "parallel.", "batch.", "data.sequence")


def validate(config: Config) -> list[ConfigError]:
    """Every contradiction between values that does not depend on layout, world size or machine.

    Types and ranges were checked before, by `moe_train.config.schema.from_mapping`.
    """
    return [
        *_hardware(config),
        *_model(config),
        *_router(config),
        *_recompute(config),
        *_optimizer(config),
        *_data(config),
        *_checkpoint(config),
        *_trace(config),
        *_backend(config),
    ]


def sizes_refused(faults: Iterable[ConfigError]) -> bool:
    """Whether arithmetic on layout and model sizes would be meaningless after `faults`."""
    sizes = {key.name for key in keys(Config) if key.name.startswith(_SIZES) and key.is_number}
    sizes |= {"recompute.layers", "dtype"}
    return any(fault.field in sizes or fault.field.startswith("hardware.") for fault in faults)


def _hardware(config: Config) -> Iterable[ConfigError]:
    for name in ("peak_tflops", "memory_gbps", "intra_node_gbps", "inter_node_gbps"):
        if not getattr(config.hardware, name):
            yield ConfigError(
                f"hardware.{name}", "has no default", "choose hardware=PROFILE, or set it"
            )


def _model(config: Config) -> Iterable[ConfigError]:
    model = config.model
    if model.dense_layers >= model.layers:
        yield ConfigError(
            "model.dense_layers",
            f"{model.dense_layers} leave no layer with experts",
            f"at most {model.layers - 1}",
        )
    if bool(model.dense_layers) != bool(model.dense_hidden):
        yield ConfigError(
            "model.dense_hidden",
            f"{model.dense_hidden} with model.dense_layers={model.dense_layers}",
            "set both or neither",
        )
    if model.q_lora_rank and not model.latent:
        yield ConfigError(
            "model.q_lora_rank", "belongs to multi-latent attention", "set model.kv_lora_rank"
        )
    if model.head_dim is None and not model.latent and model.hidden % model.heads:
        legal = [h for h in range(1, model.hidden + 1) if model.hidden % h == 0]
        legal.sort(key=lambda h: abs(h - model.heads))
        yield ConfigError(
            "model.heads",
            f"{model.heads} does not divide model.hidden={model.hidden}",
            f"set model.head_dim, or heads to one of {sorted(legal[:4])}",
        )
    elif model.kv_channels % 2:
        yield ConfigError(
            "model.head_dim", "is odd, and rotary embedding rotates pairs", "use an even width"
        )
    if model.kv_heads is not None and model.heads % model.kv_heads:
        legal = [h for h in range(1, model.heads + 1) if model.heads % h == 0]
        yield ConfigError(
            "model.kv_heads",
            f"{model.kv_heads} does not divide model.heads={model.heads}",
            f"legal: {legal}",
        )
    if model.experts_per_token > model.experts:
        yield ConfigError(
            "model.experts_per_token",
            f"{model.experts_per_token} exceeds model.experts={model.experts}",
            f"at most {model.experts}",
        )


def _router(config: Config) -> Iterable[ConfigError]:
    """Rules of Megatron's TransformerConfig.__post_init__ and TopKRouter (0.19)."""
    router, model = config.model.router, config.model
    key, method = "model.router.", BALANCING[router.balancing]
    if router.expert_bias and router.score != "sigmoid":
        yield ConfigError(
            key + "expert_bias", f"needs sigmoid scores, not {router.score}", key + "score=sigmoid"
        )
    if (
        model.experts_per_token == 1
        and router.score == "softmax"
        and not router.pre_softmax
        and not method.computes_scores
    ):
        yield ConfigError(
            key + "pre_softmax",
            "a softmax over a single chosen expert is constant, the router gets no gradient",
            f"{key}pre_softmax=true or {key}score=sigmoid",
        )
    for name in method.excludes:
        if getattr(router, name):
            yield ConfigError(
                key + name, f"does not work with {method.name}", f"{key}balancing=aux or none"
            )
    if router.pad_to_capacity and router.capacity_factor is None:
        yield ConfigError(
            key + "pad_to_capacity", "needs a capacity", f"set {key}capacity_factor, e.g. 1.0"
        )
    yield from _router_groups(config)


def _router_groups(config: Config) -> Iterable[ConfigError]:
    router, model = config.model.router, config.model
    groups, reach = router.groups, router.groups_per_token
    if (groups is None) != (reach is None):
        missing = "groups" if groups is None else "groups_per_token"
        yield ConfigError(
            f"model.router.{missing}",
            "group-limited routing needs both groups and groups_per_token",
            "set both or neither",
        )
        return
    if groups is None or reach is None:
        return
    if model.experts % groups:
        legal = [g for g in range(1, model.experts + 1) if model.experts % g == 0]
        yield ConfigError(
            "model.router.groups",
            f"{groups} does not divide model.experts={model.experts}",
            f"legal: {legal}",
        )
        return
    top = model.experts_per_token
    # Megatron scores a group by its best top // reach experts: at least one is needed.
    if reach > min(groups, top) or top // reach > model.experts // groups:
        least = -(-top // (model.experts // groups))
        yield ConfigError(
            "model.router.groups_per_token",
            f"{reach} of {groups} groups cannot hold the {top} experts of a token",
            f"legal: {least} to {min(groups, top)}",
        )


def _recompute(config: Config) -> Iterable[ConfigError]:
    recompute = config.recompute
    try:
        _ = config.recomputed_layers
    except ConfigError as fault:
        yield fault
        return
    if "shared_experts" in recompute.modules and not config.model.shared_expert_hidden:
        yield ConfigError(
            "recompute.modules", "there is no shared expert", "set model.shared_expert_hidden"
        )


def _optimizer(config: Config) -> Iterable[ConfigError]:
    optim = config.optim
    if optim.min_lr > optim.lr:
        yield ConfigError(
            "optim.min_lr", f"{optim.min_lr} exceeds optim.lr={optim.lr}", f"at most {optim.lr}"
        )
    if optim.decay_steps is not None and optim.decay_steps <= optim.warmup_steps:
        yield ConfigError(
            "optim.decay_steps",
            f"{optim.decay_steps} ends before the warm-up of {optim.warmup_steps} steps",
            f"at least {optim.warmup_steps + 1}",
        )
    descriptor = OPTIMIZERS[optim.name]
    for name in ("precision_aware", "offload"):
        if getattr(optim, name) and not getattr(descriptor, name):
            yield ConfigError(
                f"optim.{name}", f"{optim.name} has none", f"optim.{name}=false or optim.name=adamw"
            )
    if optim.precision_aware and not optim.distributed:
        yield ConfigError(
            "optim.precision_aware", "needs the distributed optimizer", "optim.distributed=true"
        )
    if optim.moment_dtype == "bf16" and not optim.precision_aware:
        yield ConfigError(
            "optim.moment_dtype", "bf16 needs optim.precision_aware", "optim.precision_aware=true"
        )
    if optim.grad_dtype == "bf16" and config.dtype == "fp32":
        yield ConfigError(
            "optim.grad_dtype", "bf16 gradients need dtype=bf16 or fp8", "optim.grad_dtype=fp32"
        )


def _trace(config: Config) -> Iterable[ConfigError]:
    parallel = config.parallel
    if config.train.trace and parallel.overlap_expert_comm and not parallel.span:
        yield ConfigError(
            "train.trace",
            "combined 1F1B fuses forward and backward passes, which a trace cannot separate",
            "parallel.overlap_expert_comm=false or train.trace=false",
        )


def _data(config: Config) -> Iterable[ConfigError]:
    share = r"\s*(\d+\.?\d*|\.\d+)\s*"
    split = config.data.split
    if not re.fullmatch(f"{share},{share},{share}", split) or not 0 < sum(
        map(float, split.split(","))
    ) < float("inf"):
        yield ConfigError(
            "data.split",
            f"{config.data.split!r} is not three non-negative numbers",
            "train,valid,test such as '98,2,0'",
        )


def _checkpoint(config: Config) -> Iterable[ConfigError]:
    checkpoint = config.checkpoint
    if checkpoint.init is not None and checkpoint.resume not in ("auto", "never"):
        yield ConfigError(
            "checkpoint.init",
            "starts a new run, and checkpoint.resume=PATH continues one",
            "keep init for the weights alone, resume for optimizer, schedule and data as well",
        )


def _backend(config: Config) -> Iterable[ConfigError]:
    backend = config.backend
    for name, group in backend.nccl_groups.items():
        if group.min_ctas and group.max_ctas and group.min_ctas > group.max_ctas:
            yield ConfigError(
                f"backend.nccl_groups.{name}.min_ctas",
                f"{group.min_ctas} exceeds max_ctas={group.max_ctas}",
                f"at most {group.max_ctas}",
            )
    if backend.expandable_segments and config.megatron.ddp.get("nccl_ub"):
        yield ConfigError(
            "backend.expandable_segments",
            "true contradicts megatron.ddp.nccl_ub, whose memory pool has fixed segments",
            "remove one of the two",
        )
