"""What can be judged from values alone, whatever the layout and the machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moe_train.config import environment, kernels, nccl
from moe_train.config.convert import nearest
from moe_train.config.layers import parse_layers
from moe_train.config.ranges import range_faults, value_at
from moe_train.config.root import Config
from moe_train.errors import ConfigError
from moe_train.features.optimizers import OPTIMIZERS

DTYPES = ("fp32", "bf16", "fp8")
CHOICES: dict[str, tuple[str, ...]] = {
    "hardware.kind": ("cpu", "accelerator"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": DTYPES,
    "model.router.score": ("softmax", "sigmoid"),
    "model.router.balancing": ("aux", "seq_aux", "global_aux", "sinkhorn", "none"),
    "model.router.drop_policy": ("probs", "position"),
    "parallel.dispatcher": ("alltoall", "allgather", "flex"),
    "optim.name": tuple(OPTIMIZERS),
    "optim.schedule": ("cosine", "linear", "wsd", "constant"),
    "optim.moment_dtype": ("fp32", "bf16"),
    "optim.grad_dtype": ("fp32", "bf16"),
    "train.non_finite": ("stop", "skip", "rollback"),
    "backend.kernels": kernels.CHOICES,
    "log.wandb": ("auto", "online", "offline", "disabled"),
    "log.console": ("auto", "bar", "lines", "none"),
}
OPTIONAL_CHOICES: dict[str, tuple[str, ...]] = {"parallel.placement": ("stage", "span")}
RECOMPUTE_MODULES = ("core_attn", "moe_act", "layernorm", "mlp", "moe", "shared_experts")


def choice_fault(key: str, value: Any, choices: Sequence[str]) -> ConfigError | None:
    """The fault of a value that is not one of `choices`, or None."""
    if value in choices:
        return None
    close = nearest(str(value), list(choices), 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return ConfigError(key, f"{value!r} is not a choice", hint + "choices: " + ", ".join(choices))


def validate(config: Config) -> list[ConfigError]:
    """Every fault that does not depend on layout, world size or machine."""
    return [
        *single_faults(config),
        *_model(config),
        *_router(config),
        *_recompute(config),
        *_optimizer(config),
        *_data(config),
        *_trace(config),
        *nccl.faults(config.backend.nccl_groups),
        *environment.faults(config),
    ]


def single_faults(config: Config) -> list[ConfigError]:
    """Every value that is a fault by itself, whatever the others are."""
    return [*_choices(config), *range_faults(config)]


def _choices(config: Config) -> Iterable[ConfigError]:
    for key, choices in CHOICES.items():
        if fault := choice_fault(key, value_at(config, key), choices):
            yield fault
    for key, choices in OPTIONAL_CHOICES.items():
        value = value_at(config, key)
        if value is not None and (fault := choice_fault(key, value, choices)):
            yield fault
    for module in config.recompute.modules:
        if fault := choice_fault("recompute.modules", module, RECOMPUTE_MODULES):
            yield fault


def _model(config: Config) -> Iterable[ConfigError]:
    model = config.model
    if min(model.hidden, model.heads, model.experts, model.experts_per_token) < 1:
        return
    if model.head_dim is None and model.hidden % model.heads:
        legal = [h for h in range(1, model.hidden + 1) if model.hidden % h == 0]
        legal.sort(key=lambda h: abs(h - model.heads))
        yield ConfigError(
            "model.heads",
            f"{model.heads} does not divide model.hidden={model.hidden}",
            f"set model.head_dim, or heads to one of {sorted(legal[:4])}",
        )
    elif (model.head_dim or model.hidden // model.heads) % 2:
        yield ConfigError(
            "model.head_dim", "is odd, while rotary embedding turns pairs", "use an even width"
        )
    if model.kv_heads is not None and (model.kv_heads < 1 or model.heads % model.kv_heads):
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
    key = "model.router."
    if router.expert_bias and router.score != "sigmoid":
        yield ConfigError(
            key + "expert_bias", f"needs sigmoid scores, not {router.score}", key + "score=sigmoid"
        )
    if (
        model.experts_per_token == 1
        and router.score == "softmax"
        and not router.pre_softmax
        and router.balancing != "sinkhorn"
    ):
        yield ConfigError(
            key + "pre_softmax",
            "a softmax over one chosen expert is constant and trains no router",
            f"{key}pre_softmax=true or {key}score=sigmoid",
        )
    if router.balancing == "sinkhorn":
        for name, used in (
            ("capacity_factor", router.capacity_factor is not None),
            ("expert_bias", router.expert_bias),
            ("groups", router.groups is not None),
        ):
            if used:
                yield ConfigError(
                    key + name, "does not work with sinkhorn", f"{key}balancing=aux or none"
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
    if groups is None or reach is None or groups < 1 or reach < 1:
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
        parse_layers(recompute.layers, config.model.layers)
    except ConfigError as fault:
        yield fault
        return
    if "shared_experts" in recompute.modules and not config.model.shared_expert_hidden:
        yield ConfigError(
            "recompute.modules", "there is no shared expert", "set model.shared_expert_hidden"
        )


def _optimizer(config: Config) -> Iterable[ConfigError]:
    optim = config.optim
    if optim.min_lr > optim.lr >= 0:
        yield ConfigError(
            "optim.min_lr", f"{optim.min_lr} exceeds optim.lr={optim.lr}", f"at most {optim.lr}"
        )
    if optim.decay_steps is not None and 0 < optim.decay_steps <= optim.warmup_steps:
        yield ConfigError(
            "optim.decay_steps",
            f"{optim.decay_steps} ends before the warm-up of {optim.warmup_steps} steps",
            f"at least {optim.warmup_steps + 1}",
        )
    descriptor = OPTIMIZERS.get(optim.name)
    for name in ("precision_aware", "offload"):
        if descriptor and getattr(optim, name) and not getattr(descriptor, name):
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
            "optim.grad_dtype", "bf16 gradients of fp32 weights", "optim.grad_dtype=fp32"
        )


def _trace(config: Config) -> Iterable[ConfigError]:
    parallel = config.parallel
    if config.train.trace and parallel.overlap_expert_comm and parallel.placement != "span":
        yield ConfigError(
            "train.trace",
            "the combined schedule runs forward and backward passes as one, not to be told apart",
            "parallel.overlap_expert_comm=false or train.trace=false",
        )


def _data(config: Config) -> Iterable[ConfigError]:
    try:
        shares = [float(part) for part in config.data.split.split(",")]
        legal = len(shares) == 3 and min(shares) >= 0 and 0 < sum(shares) < float("inf")
    except ValueError:
        legal = False
    if not legal:
        yield ConfigError(
            "data.split",
            f"{config.data.split!r} is not three shares",
            "train,valid,test such as '98,2,0'",
        )
