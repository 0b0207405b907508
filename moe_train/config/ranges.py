"""In which range each number of the config has to lie, whatever the others are."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any

from moe_train.config.root import Config
from moe_train.errors import ConfigError


def _keys(by_group: dict[str, str]) -> frozenset[str]:
    return frozenset(f"{group}.{key}" for group, keys in by_group.items() for key in keys.split())


POSITIVE = _keys(
    {
        "model": "layers hidden heads kv_heads head_dim experts experts_per_token "
        "expert_hidden vocab vocab_multiple norm_epsilon rope_base init_std",
        "model.router": "capacity_factor groups groups_per_token scaling_factor",
        "parallel": "tensor pipeline virtual_pipeline context expert expert_tensor",
        "batch": "micro microbatches accumulation global",
        "data": "sequence",
        "optim": "eps decay_steps wsd_decay_steps",
        "train": "steps eval_batches log_every",
        "checkpoint": "keep",
        "backend": "timeout_seconds host_threads cuda_device_max_connections",
        "hardware": "devices_per_node memory_gb memory_gbps intra_node_gbps inter_node_gbps "
        "gemm_efficiency grouped_efficiency attention_efficiency memory_efficiency link_efficiency",
    }
)
NOT_NEGATIVE = _keys(
    {
        "run": "seed",
        "model": "shared_expert_hidden",
        "model.router": "aux_coeff z_coeff expert_bias_rate",
        "optim": "lr embedding_lr min_lr warmup_steps weight_decay clip",
        "train": "eval_every gc_every",
        "checkpoint": "every",
        "hardware": "reserved_gb latency_us message_us layer_overhead_us expert_overhead_us "
        "microbatch_overhead_us attention_exp_gops collective_work cores",
    }
)
SHARES = _keys(
    {
        "hardware": "gemm_efficiency grouped_efficiency attention_efficiency memory_efficiency "
        "link_efficiency collective_work",
    }
)
"""At most 1."""
MOST = {
    "model.layers": 1024,
    "model.experts": 65_536,
    "model.heads": 65_536,
    **dict.fromkeys(
        ("model.hidden", "model.head_dim", "model.expert_hidden", "model.shared_expert_hidden"),
        2**24,
    ),
    **dict.fromkeys(("model.vocab", "model.vocab_multiple", "data.sequence"), 2**31 - 1),
    **dict.fromkeys(
        ("batch.micro", "batch.microbatches", "batch.accumulation", "batch.global"), 2**20
    ),
}
"""Beyond every model and batch there is, and within what a plan counts through in seconds."""


def range_faults(config: Config) -> Iterable[ConfigError]:
    """Every number outside its range."""
    for key in sorted(POSITIVE):
        value = value_at(config, key)
        if value is not None and not 0 < value < inf:
            yield ConfigError(key, f"{value} is not a positive number", "give a value above 0")
    for key in sorted(NOT_NEGATIVE):
        value = value_at(config, key)
        if value is not None and not 0 <= value < inf:
            yield ConfigError(key, f"{value} is not a number from 0 up", "give 0 or more")
    for key in sorted(SHARES):
        if not (value := value_at(config, key)) <= 1:
            yield ConfigError(key, f"{value} is more than the whole", "a share: at most 1")
    for key, most in MOST.items():
        value = value_at(config, key)
        if value is not None and value > most:
            yield ConfigError(key, f"{value} is more than any plan counts", f"at most {most}")
    for kind, peak in config.hardware.peak_tflops.items():
        if not 0 < peak < inf:
            yield ConfigError(
                f"hardware.peak_tflops.{kind}", f"{peak} is not a positive number", "TFLOP/s"
            )
    if not config.hardware.peak_tflops:
        yield ConfigError("hardware.peak_tflops", "is empty", "TFLOP/s of a dtype: {fp32: 0.1}")
    for key in ("optim.beta1", "optim.beta2", "optim.momentum"):
        value = value_at(config, key)
        if not 0 <= value < 1:
            yield ConfigError(key, f"{value} is outside [0, 1)", "usual values: 0.9, 0.95, 0.999")


def sizes_refused(faults: Iterable[ConfigError]) -> bool:
    """Whether arithmetic on layout and model sizes would be meaningless after `faults`."""
    fields = {fault.field for fault in faults}
    others = {"recompute.layers", "dtype", "model.shared_expert_hidden"}
    return bool(fields & (POSITIVE | others)) or any(f.startswith("hardware.") for f in fields)


def value_at(config: Config, key: str) -> Any:
    """The value under a dotted config key."""
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part + "_" if part == "global" else part)
    return node
