"""Megatron's configs of a CUDA run of the 30 B, constructed without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.errors import ConfigError
from moe_train.model.transformer_config import _build
from moe_train.testing.world import run_world

ROOT = Path(__file__).resolve().parents[2]
Configs = dict[str, dict[str, str]]
# Overrides, ranks, and the expert groups that Megatron is told of: where experts span the stages it
# sees the part of the group inside a stage.
EXPERIMENTS = {
    "8x64gb": (["experiment=moe_30b_8x64gb"], 8, "2"),
    "8x64gb in stages": (["experiment=moe_30b_8x64gb", "parallel.placement=stage"], 8, "2"),
    "32x64gb": (["experiment=moe_30b_32x64gb"], 32, "8"),
}

# Every field in which a host run of the same experiment may differ: kernels, nothing else.
MACHINE = {
    "transformer": {
        "transformer_impl": ("'transformer_engine'", "'local'"),
        "apply_rope_fusion": ("True", "False"),
        "moe_permute_fusion": ("True", "False"),
        "moe_router_fusion": ("True", "False"),
        "cross_entropy_loss_fusion": ("True", "False"),
        "persist_layer_norm": None,
        "gradient_accumulation_fusion": None,
        "cross_entropy_fusion_impl": None,
        "batch_p2p_sync": None,
    },
    "ddp": {},
    "optimizer": {
        "optimizer_offload_fraction": ("1.0", "0.0"),
    },
}


def cuda_process(experiment: str) -> Configs:
    """In a process of its own: the CPU backend's patches would answer for CUDA."""
    overrides, world, _ = EXPERIMENTS[experiment]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.cuda_configs", str(world), *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "stability issues" not in done.stderr, "Megatron warns of one of our choices"
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=EXPERIMENTS)
def built(request: pytest.FixtureRequest) -> tuple[str, Configs]:
    return request.param, cuda_process(request.param)


def host_configs(rank: int, one: int, overrides: list[str], world: int) -> Configs:
    from moe_train.backend.cpu.backend import CpuBackend
    from moe_train.model.transformer_config import ddp_config, optimizer_config, transformer_config
    from moe_train.planner.resolution import resolve_run
    from tests.support.cuda_configs import fields

    config = resolve_run(overrides, world).config
    backend = CpuBackend(config.backend)
    return {
        "transformer": fields(transformer_config(config, backend)),
        "ddp": fields(ddp_config(config)),
        "optimizer": fields(optimizer_config(config, backend)),
    }


def test_the_mission_is_what_cuda_would_run(built: tuple[str, Configs]) -> None:
    experiment, configs = built
    transformer = {
        "num_layers": "16",
        "hidden_size": "4608",
        "num_attention_heads": "16",
        "kv_channels": "128",
        "num_moe_experts": "64",
        "moe_ffn_hidden_size": "2048",
        "moe_router_topk": "2",
        "moe_grouped_gemm": "True",
        "moe_token_dispatcher_type": "'alltoall'",
        "tensor_model_parallel_size": "2",
        "sequence_parallel": "True",
        "pipeline_model_parallel_size": "4",
        "expert_model_parallel_size": EXPERIMENTS[experiment][2],
        "expert_tensor_parallel_size": "1",
        "bf16": "True",
        "params_dtype": "torch.bfloat16",
        "pipeline_dtype": "torch.bfloat16",
        "calculate_per_token_loss": "False",
        "add_bias_linear": "False",
        "gated_linear_unit": "True",
        "transformer_impl": "'transformer_engine'",
    }
    ddp = {
        "use_distributed_optimizer": "True",
        # Spanning experts work for other stages' micro-batches too, so a rank's gradients are
        # complete only when the whole step is.
        "overlap_grad_reduce": "False" if experiment == "8x64gb" else "True",
        "grad_reduce_in_fp32": "False",
    }
    # 12 bytes a parameter: this is what makes the model fit 64 GB.
    optimizer = {
        "use_distributed_optimizer": "True",
        "use_precision_aware_optimizer": "True",
        "bf16": "True",
        "main_params_dtype": "torch.float32",
        "main_grads_dtype": "torch.bfloat16",
        "exp_avg_dtype": "torch.bfloat16",
        "exp_avg_sq_dtype": "torch.bfloat16",
        "optimizer_cpu_offload": "False",
    }
    for name, wanted in (("transformer", transformer), ("ddp", ddp), ("optimizer", optimizer)):
        assert {key: configs[name][key] for key in wanted} == wanted


def test_host_and_cuda_differ_in_kernels_only(built: tuple[str, Configs]) -> None:
    experiment, cuda = built
    overrides, world, _ = EXPERIMENTS[experiment]
    [host] = run_world(host_configs, 1, overrides, world)
    for name, allowed in MACHINE.items():
        differing = {
            key: (value, host[name][key])
            for key, value in cuda[name].items()
            if value != host[name][key]
        }
        assert set(differing) <= set(allowed), f"{name}: {differing}"
        for key, values in allowed.items():
            if values is not None:
                assert differing.get(key) == values, f"{name}.{key}: {differing.get(key)}"


def test_answers_are_those_of_the_pinned_transformer_engine() -> None:
    from tests.support.cuda_configs import TRANSFORMER_ENGINE

    pinned = re.search(
        r"^transformer-engine-torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    assert pinned
    assert pinned[1] == TRANSFORMER_ENGINE


def test_enums_of_megatron_are_given_by_name() -> None:
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    for name in AttnBackend.__members__:
        config = _build(TransformerConfig, sizes, {"attention_backend": name}, "transformer")
        assert config.attention_backend is AttnBackend[name]
    with pytest.raises(ConfigError, match="attention_backend.*'nonsense' is unknown"):
        _build(TransformerConfig, sizes, {"attention_backend": "nonsense"}, "transformer")
