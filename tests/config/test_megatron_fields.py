"""Pass-through keys are judged by the installed Megatron, without importing it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from moe_train.config.megatron_fields import NOT_BUILT, OWN_KEYS, check_megatron, megatron_fields


def megatron_class(section: str) -> type:
    pytest.importorskip("torch")
    if section == "transformer":
        from megatron.core.transformer import transformer_config

        return transformer_config.TransformerConfig
    if section == "ddp":
        from megatron.core.distributed import DistributedDataParallelConfig

        return DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    return OptimizerConfig


@pytest.mark.parametrize("section", ["transformer", "ddp", "optimizer"])
def test_fields_are_those_of_the_real_dataclass(section: str) -> None:
    real = {f.name for f in dataclasses.fields(megatron_class(section)) if f.init}
    read = set(megatron_fields(section))
    assert real <= read
    not_settable = {f.name for f in dataclasses.fields(megatron_class(section))} - real
    assert read - real <= not_settable


@pytest.mark.parametrize("section", ["transformer", "ddp", "optimizer"])
def test_keys_of_ours_shadow_real_fields_only(section: str) -> None:
    assert set(OWN_KEYS[section]) <= set(megatron_fields(section))


def test_refused_architectures_are_fields_with_these_defaults() -> None:
    fields = megatron_fields("transformer")
    for name, (default, _) in NOT_BUILT.items():
        assert fields[name].default == repr(default), name


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("transformer", {"moe_router_padding_for_fp8": True}),
        ("transformer", {"fp8_margin": 1, "softmax_scale": 1, "mtp_num_layers": None}),
        ("transformer", {"softmax_type": "learnable", "cuda_graph_impl": "none"}),
        ("transformer", {"offload_modules": ["core_attn"], "moe_layer_freq": 1}),
        ("transformer", {"multi_latent_attention": False}),
        ("ddp", {"bucket_size": 1000000, "average_in_collective": True}),
        ("optimizer", {"main_params_dtype": "fp32", "adam_beta1": 0.9}),
    ],
)
def test_legal_values(section: str, values: dict[str, Any]) -> None:
    assert check_megatron(section, values) == []


@pytest.mark.parametrize(
    ("section", "values", "word"),
    [
        ("transformer", {"moe_router_paddin_for_fp8": True}, "moe_router_padding_for_fp8"),
        ("transformer", {"moe_router_padding_for_fp8": 3}, "bool"),
        ("transformer", {"fp8_margin": "x"}, "int"),
        ("transformer", {"softmax_type": "hard"}, "Literal"),
        ("transformer", {"activation_func": "gelu"}, "Callable"),
        ("transformer", {"offload_modules": [3]}, "list"),
        ("transformer", {"q_lora_rank": 64}, "q"),
        ("transformer", {"multi_latent_attention": True}, "attention is multi-head"),
        ("transformer", {"moe_layer_freq": [1, 0]}, "every layer is an MoE layer"),
        ("transformer", {"mtp_num_layers": 1}, "no multi-token prediction"),
        ("transformer", {"pipeline_model_parallel_layout": "E|t|L"}, "spread evenly"),
        ("transformer", {"num_layers": 4}, "model.layers"),
        ("ddp", {"use_distributed_optimizer": True}, "optim.distributed"),
        ("optimizer", {"lr": 0.1}, "optim.lr"),
    ],
)
def test_illegal_values(section: str, values: dict[str, Any], word: str) -> None:
    (fault,) = check_megatron(section, values)
    assert fault.field == f"megatron.{section}.{next(iter(values))}"
    assert word in f"{fault.problem} {fault.fix}"


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from moe_train.config.compose import compose;"
        "compose(['megatron.transformer.attention_dropout=0.1']);"
        "print([m for m in sys.modules if m in ('torch', 'megatron.core')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"
