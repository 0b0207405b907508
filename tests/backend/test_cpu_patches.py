"""The host's patches against the installed Megatron: none missing, none left over."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_train.backend.cpu import torch_cuda
from moe_train.testing.world import run_world
from tests.support.cuda_scan import Use, uses

# `module` or `module:scope`, with everything below it -> why a host run cannot get there.
CORE = "megatron.core."
EXEMPT = {
    "inference": "the inference engine: not used in training",
    "distributed.fsdp": "Megatron-FSDP is not what we wrap models in",
    "distributed.torch_fully_sharded_data_parallel": "torch FSDP is not what we wrap models in",
    "transformer.fsdp_dtensor_checkpoint": "checkpoints of Megatron-FSDP",
    "transformer.cuda_graphs": "CUDA graphs: cuda_graph_impl is none on the host",
    "full_cuda_graph": "CUDA graphs: cuda_graph_impl is none on the host",
    "tensor_parallel.random:CudaRNGStatesTracker.__init__": "an annotation of CUDA graphs",
    "nccl_allocator": "NCCL's memory pools: the host speaks gloo",
    "extensions": "TransformerEngine's modules: the host's provider has its own",
    "transformer.moe.token_dispatcher:_NCCLEPManager": "the flex dispatcher is CUDA's",
    "pipeline_parallel.fine_grained_activation_offload": "activation offloading: off",
    "pipeline_parallel.schedules:forward_step": "autocast only when enable_autocast is set",
    "pipeline_parallel.combined_1f1b:combined_forward_backward_step": (
        "autocast only when enable_autocast is set"
    ),
    "utils:StragglerDetector": "Megatron's own straggler detector: not configured",
    "tensor_parallel.random": "both functions that use these are replaced in apply_late",
    "tensor_parallel.layers": "custom_fwd(device_type=cuda) looks at autocast alone",
}
# Who may be given a device literal: the factories, Tensor.to, and devices made to be given on.
RECEIVERS = {f"torch.{name}" for name in torch_cuda.FACTORIES} | {".to", "torch.device"}
OBJECTS = {
    "Stream": torch_cuda.CpuStream,
    "Event": torch_cuda.CpuEvent,
    "current_stream": torch_cuda.CpuStream,
}


def _loaded(rank: int, world: int) -> dict[str, str]:
    """Megatron's modules after a step with much switched on, and what saving needs."""
    import importlib
    import sys

    from moe_train.train.step import train_step
    from tests.support.engines import micro_batches, open_engine

    engine = open_engine(
        rank,
        world,
        [
            *("experiment=single", "model.layers=2", "model.shared_expert_hidden=16"),
            *("dtype=bf16", "optim.distributed=true", "batch.global=8", "data.sequence=32"),
        ],
        vocab=256,
    )
    tokens = np.random.default_rng(0).integers(0, 256, (8, 33))
    train_step(engine, micro_batches(engine, tokens), 1)
    for name in ("checkpoint.save", "checkpoint.load", "data.datasets", "run"):
        importlib.import_module(f"moe_train.{name}")
    return {
        name: module.__file__
        for name, module in sys.modules.items()
        if name.startswith(CORE) and getattr(module, "__file__", None)
    }


@cache
def all_uses() -> tuple[Use, ...]:
    results: list[Use] = []
    for module, path in run_world(_loaded, 1)[0].items():
        results += uses(module.removeprefix(CORE), Path(path).read_text(encoding="utf-8"))
    assert len(results) > 200, "the scan finds next to nothing: is Megatron laid out differently?"
    return tuple(results)


def exemption(use: Use) -> str | None:
    """The key that exempts `use`, the narrowest first."""
    for key in sorted(EXEMPT, key=len, reverse=True):
        module, _, scope = key.partition(":")
        inside = use.module == module or use.module.startswith(module + ".")
        if inside and (not scope or use.scope == scope or use.scope.startswith(scope + ".")):
            return key
    return None


def handled(use: Use) -> bool:
    if use.kind == "attribute":
        root = use.name.split(".")[0]
        known = use.name in torch_cuda.CUDA_CALLS or use.name in torch_cuda.CUDA_UNTOUCHED
        return known or (root in OBJECTS and _has(root, use.name.partition(".")[2]))
    if use.kind == "object":
        root, _, name = use.name.partition(".")
        return _has(root, name)
    if use.kind == "method":
        return use.name in torch_cuda.TENSOR_METHODS
    # A stream is made for a device; ours takes anything.
    return use.name in RECEIVERS or use.name == "torch.cuda.Stream"


def _has(root: str, name: str) -> bool:
    return hasattr(OBJECTS[root], name)


def unanswered(listed: Iterable[Use]) -> list[str]:
    return [str(use) for use in listed if not handled(use) and exemption(use) is None]


def test_every_cuda_use_has_an_answer() -> None:
    missing = unanswered(all_uses())
    assert not missing, "CUDA uses that the host does not handle:\n" + "\n".join(missing)


def test_every_exemption_is_used() -> None:
    used = {exemption(use) for use in all_uses() if not handled(use)}
    assert set(EXEMPT) <= used, f"exempt nothing: {sorted(set(EXEMPT) - used)}"


def test_every_replaced_name_is_used() -> None:
    used = {use.name for use in all_uses() if use.kind == "attribute"}
    left_over = {*torch_cuda.CUDA_CALLS, *torch_cuda.CUDA_UNTOUCHED} - used
    assert not left_over, f"Megatron uses these no longer: {sorted(left_over)}"
    methods = {use.name for use in all_uses() if use.kind == "method"}
    assert methods == {"cuda", "record_stream"}


@pytest.mark.parametrize(
    ("source", "kind", "name"),
    [
        ("import torch\ntorch.cuda.brand_new(1)", "attribute", "brand_new"),
        ("import torch\ndef f():\n  torch.cuda.nvtx.other()", "attribute", "nvtx.other"),
        ("from torch.cuda import ipc_collect", "attribute", "ipc_collect"),
        ("from torch.cuda.amp import GradScaler", "attribute", "amp.GradScaler"),
        ("import torch\ntorch.Generator(device='cuda')", "literal", "torch.Generator"),
        ("import torch\ntorch.zeros_new(1, device=f'cuda:{0}')", "literal", "torch.zeros_new"),
        ("def f(device='cuda'): pass", "literal", "a default argument"),
        ("import torch\ntorch.cuda.current_stream().bend()", "object", "current_stream.bend"),
    ],
)
def test_the_scan_sees_what_is_new(source: str, kind: str, name: str) -> None:
    result = list(uses("new_module", source))
    assert (kind, name) in {(use.kind, use.name) for use in result}
    assert unanswered(result)


def test_the_scan_lets_guards_and_handled_uses_pass() -> None:
    source = """
import torch
if x.device.type == "cuda":
    y = torch.zeros(1, device="cuda").to("cuda").cuda()
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream(device="cuda"))
    s = "torch.cuda.FloatTensor"
"""
    assert unanswered(uses("fine", source)) == []


def _polling_threads(rank: int, world: int, shared: bool) -> int:
    """Threads that poll the network after making three groups."""
    import torch.distributed as dist

    from moe_train.backend.cpu import gloo
    from moe_train.backend.cpu.backend import CpuBackend
    from moe_train.backend.groups import open_world
    from moe_train.config.training import BackendConfig

    if not shared:
        dist.distributed_c10d._register_builtin_gloo_backend()
    else:
        gloo.share_device()
    open_world(CpuBackend(BackendConfig()), rank, world, 60)
    pairs = [dist.new_group([0, 1]) for _ in range(3)]
    dist.barrier(pairs[-1])
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("gloo_tcp_loop") for name in names)


@pytest.mark.world
@pytest.mark.skipif(
    not hasattr(torch.distributed.distributed_c10d, "_register_builtin_gloo_backend"),
    reason="this torch makes gloo groups itself, each with a device of its own",
)
def test_groups_share_one_network_device() -> None:
    assert run_world(_polling_threads, 2, False) == [4, 4], "torch shares it by itself now"
    assert run_world(_polling_threads, 2, True) == [1, 1]


def _compiler_imported(rank: int, world: int) -> list[bool]:
    """Whether torch's compiler is there: after an engine was built and has made a step."""
    import sys

    _loaded(rank, world)
    ours = "torch._dynamo" in sys.modules
    plain = __import__("torch").optim.Optimizer.zero_grad.__wrapped__
    delattr(plain, "__dynamo_disable")
    torch = __import__("torch")
    torch.optim.SGD([torch.zeros(1, requires_grad=True)]).zero_grad()
    return [ours, "torch._dynamo" in sys.modules]


@pytest.mark.world
def test_the_compiler_stays_out() -> None:
    ours, without_the_patch = run_world(_compiler_imported, 1)[0]
    assert not ours
    assert without_the_patch, "torch no longer imports its compiler for an optimizer"
