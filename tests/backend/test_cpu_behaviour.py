"""Each patch of Megatron answers a behaviour, seen in a process that has no patches."""

from __future__ import annotations

import multiprocessing
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from moe_train.backend import patches
from moe_train.backend.cpu import gloo, torch_cuda
from moe_train.testing.world import run_world


def _norm(gradient: torch.Tensor) -> float:
    """What Megatron's optimizers compute for one gradient."""
    from megatron.core.optimizer import clip_grads

    result = clip_grads.multi_tensor_applier(
        clip_grads.l2_norm_impl, torch.zeros(1, dtype=torch.int), [[gradient]], False
    )
    return float(result[0])


def _clip_copies() -> int:
    """Elements of new tensors that clipping one gradient makes."""
    from megatron.core.optimizer import clip_grads
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if torch.is_tensor(result) and result.data_ptr() != gradient.data_ptr():
                self.made += result.numel()
            return result

    gradient = torch.ones(100)
    with Count() as count:
        clip_grads.multi_tensor_applier(
            clip_grads.multi_tensor_scale_impl, None, [[gradient], [gradient]], 0.5
        )
    assert torch.equal(gradient, torch.full((100,), 0.5))
    return count.made


def _pristine(connection: Any) -> None:
    import sys

    import torch
    from megatron.core import optimizer
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    def refusal(call: Any) -> str:
        try:
            call()
        except Exception as problem:  # noqa: BLE001  whatever it says is the fact
            return f"{type(problem).__name__}: {problem}"
        return ""

    config = TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        normalization="RMSNorm",
    )
    adam = optimizer.Adam([p := torch.nn.Parameter(torch.ones(3))])
    p.grad = torch.ones(3)
    adam.step()
    with mock.patch("torch.tensor", lambda data, **_: torch.as_tensor(data)):
        norm = _norm(torch.full((4_000_003,), 1.1))
    facts = {
        "splits": torch.is_tensor(maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True)),
        "norm": refusal(lambda: WrappedTorchNorm(config, 8)),
        "adam": (type(adam).__module__, "step" in adam.state[p], optimizer.USING_PYTORCH_OPTIMIZER),
        "type": torch.ones(1).type(),
        "precision_aware": refusal(
            lambda: OptimizerConfig(
                use_precision_aware_optimizer=True,
                use_distributed_optimizer=True,
                bf16=True,
                lr=1.0,
            )
        ),
        "te": optimizer.is_te_min_version("1.0"),
        "rng": "" if torch.cuda.is_available() else refusal(random._get_cuda_rng_state),
        "experts": LocalSpecProvider().grouped_mlp_modules(True).__class__.__name__
        + str(LocalSpecProvider().grouped_mlp_modules(True)),
        "fp8": hasattr(random, "FP8GlobalStateManager"),
        "heavy": "torch._inductor" in sys.modules,
        "l2": norm,
        "clip": _clip_copies(),
    }
    connection.send(facts)


def _lean(connection: Any) -> None:
    """What a rank's preparation imports."""
    import sys

    from moe_train.backend.cpu.backend import CpuBackend
    from moe_train.config.training import BackendConfig

    CpuBackend(BackendConfig()).prepare()
    deterministic = torch.are_deterministic_algorithms_enabled()
    connection.send((HEAVY & set(sys.modules), deterministic))


HEAVY = {"torch._inductor", "torch._dynamo", "wandb"}


def _in_a_new_process(function: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return {}
    finally:
        process.join()


@cache
def pristine() -> dict[str, Any]:
    facts: dict[str, Any] = _in_a_new_process(_pristine)
    return facts


def _patched(rank: int, world: int) -> dict[str, Any]:
    import sys

    from megatron.core import optimizer
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    with patches.fused_adam_visible():
        OptimizerConfig(
            use_precision_aware_optimizer=True, use_distributed_optimizer=True, bf16=True, lr=1.0
        )
    adam = optimizer.Adam([p := torch.nn.Parameter(torch.ones(3))])
    p.grad = torch.ones(3)
    adam.step()
    torch.manual_seed(3)
    state = random._get_cuda_rng_state()
    first = torch.rand(3)
    random._set_cuda_rng_state(state)
    again = torch.equal(torch.rand(3), first)
    made = {
        str(getattr(torch, name)(*arguments, device=device).device)
        for device in ("cuda", "cuda:0", torch.device("cuda"))
        for name, arguments in _FACTORY_ARGUMENTS.items()
    }
    return {
        "splits": type(
            token_dispatcher.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True)
        ).__name__,
        "adam": (type(adam).__name__, "step" in adam.state[p], adam.param_groups[0]["step"]),
        "types": (
            torch.ones(1).type(),
            torch.ones(1).bfloat16().type(),
            torch.ones(1).half().type(),
        ),
        "retyped": torch.ones(1).type(torch.int64).dtype == torch.int64,
        "rng": again,
        "l2": _norm(torch.full((4_000_003,), 1.1)),
        "clip": _clip_copies(),
        "devices": made
        | {str(torch.ones(1).cuda().device), str(torch.ones(1).to("cuda").device)}
        | {str(torch.ones(1).to(device="cuda:0").device), str(torch.cuda.current_device())},
        "visible": sys.modules["transformer_engine"] is not None,
        "te": optimizer.is_te_min_version("1.0"),
    }


_FACTORY_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "arange": (2,),
    "as_tensor": ([1.0],),
    "empty": (2,),
    "empty_like": (torch.ones(1),),
    "eye": (2,),
    "full": ((2,), 1.0),
    "full_like": (torch.ones(1), 1.0),
    "linspace": (0, 1, 2),
    "ones": (2,),
    "ones_like": (torch.ones(1),),
    "rand": (2,),
    "randn": (2,),
    "tensor": ([1.0],),
    "zeros": (2,),
    "zeros_like": (torch.ones(1),),
}


@cache
def patched() -> dict[str, Any]:
    facts: dict[str, Any] = run_world(_patched, 1)[0]
    return facts


def test_splits_still_stay_tensors_without_the_patch() -> None:
    assert pristine()["splits"] is True
    assert patched()["splits"] == "ndarray"


def test_torch_norm_still_refuses_sequence_parallelism() -> None:
    assert "sequence" in pristine()["norm"].lower()


def test_torch_adam_still_keeps_its_step_per_parameter() -> None:
    assert pristine()["adam"] == ("torch.optim.adamw", True, True)
    assert patched()["adam"] == ("TorchAdam", False, 1)


def test_tensor_types_are_still_compared_by_their_cuda_names() -> None:
    from importlib.util import find_spec

    assert pristine()["type"] == "torch.FloatTensor"
    spec = find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations
    core = Path(next(iter(spec.submodule_search_locations))) / "core" / "optimizer"
    source = (core / "optimizer.py").read_text() + (core / "distrib_optimizer.py").read_text()
    assert ".type() == 'torch.cuda.FloatTensor'" in source
    names = ("torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.cuda.HalfTensor")
    assert patched()["types"] == names
    assert patched()["retyped"]


def test_precision_aware_still_asks_for_transformer_engine() -> None:
    assert "FusedAdam" in pristine()["precision_aware"]
    assert pristine()["te"] is patched()["te"] is False
    assert not patched()["visible"], "the stand-in modules must vanish again"


def test_the_rng_tracker_still_goes_through_cuda() -> None:
    if torch.cuda.is_available():
        pytest.skip("on a machine with a GPU the unpatched tracker works, on the GPU")
    assert pristine()["rng"]
    assert patched()["rng"]


def test_recomputing_still_asks_te_about_fp8() -> None:
    """That our answer is enough, every ``recompute.modules`` variant shows by training."""
    assert pristine()["fp8"] is False


def test_local_experts_are_still_sequential() -> None:
    assert "SequentialMLP" in pristine()["experts"]


def test_imports_are_leaner_than_megatrons_own() -> None:
    assert pristine()["heavy"], "Megatron no longer imports the compiler: lean_imports can go"
    imported, deterministic = _in_a_new_process(_lean)
    assert not imported
    assert deterministic


def test_the_fallback_norm_still_rounds_badly() -> None:
    exact = 1.1 * 4_000_003**0.5
    exact *= float(np.float32(1.1)) / 1.1
    assert abs(patched()["l2"] / exact - 1) < 1e-6
    assert abs(pristine()["l2"] / exact - 1) > 1e-6


def test_the_fallback_clips_through_a_copy() -> None:
    assert pristine()["clip"] == 100
    assert patched()["clip"] == 0


def test_literal_devices_are_the_host() -> None:
    assert set(_FACTORY_ARGUMENTS) == set(torch_cuda.FACTORIES)
    assert patched()["devices"] == {"cpu"}


def _uneven_rows(rank: int, world: int) -> list[Any]:
    """Rows that are gathered and reduced over two ranks, the other's having none, one or three."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    from moe_train.backend.cpu.backend import CpuBackend
    from moe_train.backend.groups import open_world
    from moe_train.config.training import BackendConfig

    open_world(CpuBackend(BackendConfig()), rank, world, 60)
    plain = mappings._gather_along_first_dim.args[0]
    results: list[Any] = []
    try:
        plain(torch.zeros(1 + rank, 2), dist.group.WORLD, [1, 2])
        results.append("gathered")
    except RuntimeError as refusal:
        results.append(str(refusal))
    for sizes in ([1, 3], [0, 2], [2, 2], [0, 0]):
        x_NH = torch.full((sizes[rank], 2), float(rank + 1), requires_grad=True)
        gathered = mappings.gather_from_sequence_parallel_region(
            x_NH, group=dist.group.WORLD, output_split_sizes=sizes
        )
        (gathered * (rank + 1)).sum().backward()
        reduced = mappings.reduce_scatter_to_sequence_parallel_region(
            gathered.detach() * (rank + 1), group=dist.group.WORLD, input_split_sizes=sizes
        )
        assert x_NH.grad is not None
        results.append([each.tolist() for each in (gathered, x_NH.grad, reduced)])
    return results


@pytest.mark.world
def test_uneven_rows_are_gathered_and_reduced_over_gloo() -> None:
    ranks = run_world(_uneven_rows, 2)
    for rank, (refusal, *result) in enumerate(ranks):
        assert "invalid tensor size" in refusal, "gloo gathers uneven sizes itself now"
        for sizes, (gathered, gradient, reduced) in zip(
            ([1, 3], [0, 2], [2, 2], [0, 0]), result, strict=True
        ):
            assert gathered == [[1.0, 1.0]] * sizes[0] + [[2.0, 2.0]] * sizes[1]
            assert gradient == [[3.0, 3.0]] * sizes[rank]
            assert reduced == [[3.0 * (rank + 1)] * 2] * sizes[rank]


@pytest.mark.parametrize(
    ("environment", "interface"),
    [
        ({}, "lo"),
        ({"WORLD_SIZE": "8"}, "lo"),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, "lo"),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, None),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
    ],
)
def test_gloo_takes_loopback_on_one_node_only(
    environment: dict[str, str], interface: str | None
) -> None:
    assert gloo.select_interface(environment) == interface
