"""Torch's kernels on a GPU: Megatron is patched at TransformerEngine's seams and nowhere else."""

from __future__ import annotations

import multiprocessing
from functools import partial
from typing import Any

import pytest
import torch

from moe_train.backend import patches
from moe_train.backend.cpu import torch_cuda


def _surface() -> dict[str, Any]:
    """What a machine without CUDA has replaced in torch."""
    import functools

    names = {f"cuda.{name}": torch.cuda for name in torch_cuda.CUDA_CALLS}
    result = {
        name: functools.reduce(getattr, name.split(".")[1:], root) for name, root in names.items()
    }
    result |= {name: getattr(torch, name) for name in torch_cuda.FACTORIES}
    return result | {f"Tensor.{n}": getattr(torch.Tensor, n) for n in torch_cuda.TENSOR_METHODS}


def _patched(connection: Any, lean: bool) -> None:
    """A process on a machine whose GPU is there: only TransformerEngine is not."""
    import importlib
    import sys

    before, compiler = _surface(), torch.compile
    patches.apply_missing_te(lean=lean)
    after = _surface()
    wrong = [
        f"{patch.module}.{patch.name}"
        for patch in patches.missing_te()
        if getattr(importlib.import_module(f"megatron.core.{patch.module}"), patch.name)
        is not patch.replacement
        # Built anew by every call of missing_te.
        and patch.name not in STAND_INS
    ]
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.optimizer import Adam
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.core.tensor_parallel import random

    with patches.fused_adam_visible():
        config = OptimizerConfig(
            use_precision_aware_optimizer=True, use_distributed_optimizer=True, bf16=True, lr=1.0
        )
    try:
        importlib.import_module("transformer_engine")
        imported = True
    except ImportError:
        imported = False
    connection.send(
        {
            "changed": sorted(name for name in before if before[name] is not after[name]),
            "compiler": torch.compile is compiler,
            "compiled": hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable"),
            "wrong": wrong,
            "te": HAVE_TE or imported,
            "adam": Adam.__name__,
            "remainders": config.store_param_remainders,
            "fp8": random.FP8GlobalStateManager.is_fp8_enabled(),
            "dynamo": "torch._dynamo" in sys.modules,
        }
    )


STAND_INS = ("FP8GlobalStateManager", "activation_recompute_forward", "fp8_autocast")


def in_a_new_process(function: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(theirs,))
    process.start()
    theirs.close()
    try:
        facts: dict[str, Any] = ours.recv()
    except EOFError:
        pytest.fail("the process died, see its output")
    finally:
        process.join()
    return facts


@pytest.mark.parametrize("lean", [True, False])
def test_only_transformer_engines_seams_are_patched(lean: bool) -> None:
    facts = in_a_new_process(partial(_patched, lean=lean))
    assert facts["changed"] == [], "torch itself is left alone where there is a GPU"
    assert facts["wrong"] == []
    assert facts["te"] is False and facts["adam"] == "TorchAdam" and facts["fp8"] is False
    assert facts["remainders"] is False, "TorchAdam has no 16-bit remainders"
    assert facts["compiler"], "torch.compile is the user's again"
    assert facts["compiled"] is not lean


def test_every_patch_says_why() -> None:
    assert all(len(patch.reason) > 20 for patch in (*patches.MISSING_CUDA, *patches.missing_te()))
    places = [(p.module, p.name) for p in (*patches.MISSING_CUDA, *patches.missing_te())]
    assert len(set(places)) == len(places)
