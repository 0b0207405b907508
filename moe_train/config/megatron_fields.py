"""Field names and types of Megatron's own config dataclasses, read from their source.

Importing megatron.core takes seconds and needs torch, which the planner does without. The
installed source is parsed instead, so the fields are always those of the installed version.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moe_train.config.schema import unknown_key
from moe_train.errors import ConfigError

SOURCES: dict[str, tuple[tuple[str, str], ...]] = {
    "transformer": (
        ("model_parallel_config.py", "ModelParallelConfig"),
        ("transformer/transformer_config.py", "TransformerConfig"),
    ),
    "ddp": (("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),),
    "optimizer": (("optimizer/optimizer_config.py", "OptimizerConfig"),),
}
"""Config sections and the (file, class) pairs, base first, that define their fields."""

OWN_KEYS: dict[str, dict[str, str]] = {
    "transformer": {
        "num_layers": "model.layers",
        "hidden_size": "model.hidden",
        "num_attention_heads": "model.heads",
        "num_query_groups": "model.kv_heads",
        "kv_channels": "model.head_dim",
        "qk_layernorm": "model.qk_norm",
        "num_moe_experts": "model.experts",
        "moe_router_topk": "model.experts_per_token",
        "moe_ffn_hidden_size": "model.expert_hidden",
        "moe_shared_expert_intermediate_size": "model.shared_expert_hidden",
        "tensor_model_parallel_size": "parallel.tensor",
        "pipeline_model_parallel_size": "parallel.pipeline",
        "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
        "context_parallel_size": "parallel.context",
        "expert_model_parallel_size": "parallel.expert",
        "expert_tensor_parallel_size": "parallel.expert_tensor",
        "sequence_parallel": "parallel.tensor",
        "overlap_moe_expert_parallel_comm": "parallel.overlap_expert_comm",
        "moe_token_dispatcher_type": "parallel.dispatcher",
        "recompute_modules": "recompute.modules",
        "recompute_granularity": "recompute.layers",
        "recompute_method": "recompute.layers",
        "recompute_num_layers": "recompute.layers",
        "bf16": "dtype",
        "fp16": "dtype",
        "params_dtype": "dtype",
    },
    "ddp": {
        "use_distributed_optimizer": "optim.distributed",
        "overlap_grad_reduce": "parallel.overlap_grad_reduce",
        "overlap_param_gather": "parallel.overlap_param_gather",
    },
    "optimizer": {
        "optimizer": "optim.name",
        "lr": "optim.lr",
        "decoupled_lr": "optim.embedding_lr",
        "min_lr": "optim.min_lr",
        "weight_decay": "optim.weight_decay",
        "clip_grad": "optim.clip",
        "use_distributed_optimizer": "optim.distributed",
        "use_precision_aware_optimizer": "optim.precision_aware",
        "bf16": "dtype",
        "fp16": "dtype",
        "params_dtype": "dtype",
    },
}
"""Fields that a key of moe_train sets; a second value for them would contradict the plan."""

_EVEN = "layers are spread evenly over the pipeline stages"
_ATTENTION = "attention is multi-head or grouped-query (model.heads, model.kv_heads)"
NOT_BUILT: dict[str, tuple[Any, str]] = {
    "multi_latent_attention": (False, _ATTENTION),
    "experimental_attention_variant": (None, _ATTENTION),
    "linear_attention_freq": (None, _ATTENTION),
    "qk_l2_norm": (False, "queries and keys are normalised by RMSNorm (model.qk_norm) or not"),
    "moe_layer_freq": (1, "every layer is an MoE layer"),
    "mtp_num_layers": (None, "there is no multi-token prediction head"),
    "is_hybrid_model": (False, "every layer is a transformer layer"),
    "heterogeneous_block_specs": (False, "all layers are built alike"),
    "pipeline_model_parallel_layout": (None, _EVEN),
    "num_layers_in_first_pipeline_stage": (None, _EVEN),
    "num_layers_in_last_pipeline_stage": (None, _EVEN),
    "account_for_embedding_in_pipeline_split": (False, _EVEN),
    "account_for_loss_in_pipeline_split": (False, _EVEN),
}
"""Fields of TransformerConfig that choose another module spec than `moe_train.model.spec` builds,
with Megatron's default and what is built: Megatron's own spec functions read them, the modules do
not, so that any other value would be ignored."""


@dataclass(frozen=True)
class MegatronField:
    """One field: its annotation and its default (None where it has none) as source text."""

    annotation: str
    default: str | None


def _core() -> Path:
    # Finding megatron.core imports only its parent, an empty namespace package.
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "megatron", "megatron-core is not installed in this environment", "run make setup"
        )
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _module(path: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse((_core() / path).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def megatron_fields(section: str) -> dict[str, MegatronField]:
    """Fields of one section (a key of `SOURCES`), by name, base classes included.

    Raises:
        ConfigError: if megatron-core is not installed.
    """
    fields: dict[str, MegatronField] = {}
    for path, cls in SOURCES[section]:
        for node in _module(path)[cls].body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            annotation = ast.unparse(node.annotation)
            if annotation.startswith(("ClassVar", "typing.ClassVar", "InitVar")):
                continue
            default = ast.unparse(node.value) if node.value is not None else None
            fields[node.target.id] = MegatronField(annotation, default)
    return fields


_PLAIN: dict[str, Callable[[Any], bool]] = {
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
    "list": lambda v: isinstance(v, list | tuple),
    "List": lambda v: isinstance(v, list | tuple),
    "tuple": lambda v: isinstance(v, list | tuple),
    "Tuple": lambda v: isinstance(v, list | tuple),
    "dict": lambda v: isinstance(v, Mapping),
    "Dict": lambda v: isinstance(v, Mapping),
    "None": lambda v: v is None,
}


def _accepts(node: ast.expr, value: Any) -> bool:
    """Whether an annotation accepts `value`; unknown names (enums, dtypes) accept strings."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return _accepts(ast.parse(node.value, mode="eval").body, value)
        return node.value is None and value is None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _accepts(node.left, value) or _accepts(node.right, value)
    if isinstance(node, ast.Subscript):
        name = ast.unparse(node.value).rpartition(".")[2]
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Optional":
            return value is None or _accepts(parts[0], value)
        if name == "Union":
            return any(_accepts(p, value) for p in parts)
        if name == "Literal":
            return value in [p.value for p in parts if isinstance(p, ast.Constant)]
        if name in ("list", "List") and isinstance(value, list | tuple):
            return all(_accepts(parts[0], v) for v in value)
        return name in _PLAIN and _PLAIN[name](value)
    name = ast.unparse(node).rpartition(".")[2]
    if name in _PLAIN:
        return _PLAIN[name](value)
    if name == "Callable":
        return False
    # Enums, dtypes and Megatron's own classes are given by name.
    return name == "Any" or isinstance(value, str)


def check_megatron(section: str, values: Mapping[str, Any]) -> list[ConfigError]:
    """Faults of the keys under ``megatron.<section>``.

    A key may be unknown, mistyped, set by another key, or of an architecture that is not built.

    Args:
        section: transformer | ddp | optimizer.
        values: field name to value, as composed.
    """
    if not values:
        return []
    known = megatron_fields(section)
    faults = []
    for name, value in values.items():
        key = f"megatron.{section}.{name}"
        if name not in known:
            faults.append(unknown_key(key, [f"megatron.{section}.{k}" for k in known]))
        elif name in OWN_KEYS[section]:
            fix = f"set {OWN_KEYS[section][name]} instead"
            faults.append(ConfigError(key, "is set by a key of moe_train", fix))
        elif section == "transformer" and name in NOT_BUILT and value != NOT_BUILT[name][0]:
            problem = f"{value}: this architecture is not built: {NOT_BUILT[name][1]}"
            fix = f"leave it at Megatron's default, {NOT_BUILT[name][0]}"
            faults.append(ConfigError(key, problem, fix))
        elif not _accepts(ast.parse(known[name].annotation, mode="eval").body, value):
            problem = f"{value!r} does not fit Megatron's type {known[name].annotation}"
            faults.append(ConfigError(key, problem, f"Megatron's default is {known[name].default}"))
    return faults
