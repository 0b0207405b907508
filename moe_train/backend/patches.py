"""Every patch of Megatron-Core and torch, each with its reason, most in two tables.

*Missing CUDA*: CPU and gloo replace GPU and NCCL (``MISSING_CUDA``, and the tables of
`moe_train.backend.cpu.torch_cuda`); applied by the CPU backend only.
*Missing TransformerEngine*: torch's kernels replace TransformerEngine's (``missing_te``);
applied wherever those are used, on CPU and GPU. With TransformerEngine nothing of it is.
*Everywhere*, while the process groups are made: :func:`local_singletons`.

``tests/backend/test_cpu_patches.py`` holds the tables against every CUDA use in Megatron's
installed source, ``tests/backend/test_cpu_behaviour.py`` each patch against the behaviour that made
it necessary.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pkgutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moe_train.backend import local_group
from moe_train.backend.cpu import gloo, torch_cuda
from moe_train.config.kernels import TRANSFORMER_ENGINE
from moe_train.config.training import OptimConfig
from moe_train.features.optimizers import Optimizer


def keep_compiler_out() -> None:
    """Mark the optimizer methods that torch hides from its compiler as hidden already.

    Their first call would import torch._dynamo for that, which nothing else here needs: seconds
    of every rank's start.
    """
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        plain = getattr(torch.optim.Optimizer, name).__wrapped__
        setattr(plain, "__dynamo_disable", plain)


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Import Megatron without what a CPU rank never uses.

    ``jit_fuser`` is ``torch.compile``, whose import alone (torch._dynamo, torch._inductor) is
    about half of a rank's start-up; Megatron's timers import wandb, which our mirror does
    later and elsewhere.
    """
    compile_, blocked = torch.compile, [m for m in ("wandb",) if m not in sys.modules]

    def identity(function: Any = None, **_: Any) -> Any:
        return function if function is not None else identity

    torch.compile = identity  # type: ignore[assignment]
    for module in blocked:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_
        for module in blocked:
            del sys.modules[module]


@dataclass(frozen=True)
class Patch:
    """``replacement`` for ``name`` in Megatron's ``module`` (below ``megatron.core``)."""

    module: str
    name: str
    replacement: Any
    reason: str
    wraps: bool = False
    """The replacement takes what it replaces as its first argument."""

    def apply(self) -> None:
        """Replace the name, which has to be there; call inside :func:`lean_imports`."""
        module = importlib.import_module(f"megatron.core.{self.module}")
        replacement = self.replacement
        if self.wraps:
            replacement = functools.partial(replacement, getattr(module, self.name))
        setattr(module, self.name, replacement)


_SPLITS = (
    "on CUDA the splits become numpy arrays on their way off the device; without a device they "
    "would stay tensors, which all_to_all_single refuses"
)
_TRACKER = "the tracker goes through torch's lazy CUDA initialisation otherwise"
_UNEVEN = "with expert tensor parallelism ranks gather as many rows as were routed to each"
_MAPPINGS = "tensor_parallel.mappings"

MISSING_CUDA: tuple[Patch, ...] = (
    *(
        Patch(
            f"transformer.moe.{module}",
            "maybe_move_tensor_to_cpu",
            lambda tensor, as_numpy=False, record_stream=False: (
                tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
            ),
            _SPLITS,
        )
        for module in ("moe_utils", "token_dispatcher")
    ),
    Patch(
        "tensor_parallel.random",
        "_get_cuda_rng_state",
        lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state(),
        _TRACKER,
    ),
    Patch(
        "tensor_parallel.random",
        "_set_cuda_rng_state",
        lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
        _TRACKER,
    ),
    Patch(_MAPPINGS, "_gather_along_first_dim", gloo.gather_first_dim, _UNEVEN, wraps=True),
    Patch(
        _MAPPINGS,
        "_reduce_scatter_along_first_dim",
        gloo.reduce_scatter_first_dim,
        _UNEVEN,
        wraps=True,
    ),
)


def missing_te() -> tuple[Patch, ...]:
    """What torch's kernels replace in Megatron; a function, since they import Megatron."""
    from moe_train.backend.torch_kernels.adam import TorchAdam
    from moe_train.backend.torch_kernels.gradient_norm import (
        multi_tensor_l2_norm,
        multi_tensor_scale,
    )

    fp8 = "CheckpointWithoutOutput (recompute.modules) takes no fp8 for fp8 and asks TE about it"
    return (
        Patch(
            "optimizer",
            "Adam",
            TorchAdam,
            "torch's AdamW keeps `step` per parameter and has no precision-aware mode; Megatron is "
            "written for TransformerEngine's FusedAdam",
        ),
        Patch("optimizer", "USING_PYTORCH_OPTIMIZER", False, "TorchAdam is no torch.optim.AdamW"),
        Patch(
            "tensor_parallel.random",
            "FP8GlobalStateManager",
            types.SimpleNamespace(is_fp8_enabled=lambda: False),
            fp8,
        ),
        Patch(
            "tensor_parallel.random",
            "activation_recompute_forward",
            lambda **_: contextlib.nullcontext(),
            fp8,
        ),
        Patch("tensor_parallel.random", "fp8_autocast", lambda **_: contextlib.nullcontext(), fp8),
        Patch(
            "optimizer.clip_grads",
            "l2_norm_impl",
            multi_tensor_l2_norm,
            "the fallback's rounding depends on how a gradient is cut, and so on the layout",
        ),
        Patch(
            "optimizer.clip_grads",
            "multi_tensor_scale_impl",
            multi_tensor_scale,
            "the fallback's copy is as large as the largest gradient",
        ),
    )


def apply_missing_cuda() -> None:
    """Apply the patches for a CPU to this process; imports Megatron."""
    if not _once("_moe_train_no_cuda"):
        return
    if (interface := gloo.select_interface()) is not None:
        os.environ[gloo.INTERFACE] = interface
    torch_cuda.patch_torch()
    gloo.share_device()
    keep_compiler_out()
    with lean_imports():
        _import_megatron()
        for patch in MISSING_CUDA:
            patch.apply()


def apply_missing_te(*, lean: bool = True) -> None:
    """Apply the patches for torch's kernels to this process; imports Megatron.

    Args:
        lean: import Megatron without its compiled functions.
    """
    if not _once("_moe_train_no_te"):
        return
    hide_transformer_engine()
    with lean_imports() if lean else contextlib.nullcontext():
        _import_megatron()
        for patch in missing_te():
            patch.apply()


def hide_transformer_engine() -> None:
    """Let no import of TransformerEngine succeed from now on, installed or not.

    Megatron decides by its import which kernels it uses in places that no option reaches: gradient
    clipping, dummy gradients, RNG states.
    """
    # One that is too old has been imported by now, and its parts would still be found.
    parts = [name for name in sys.modules if name.startswith(f"{TRANSFORMER_ENGINE}.")]
    for name in (TRANSFORMER_ENGINE, *parts):
        sys.modules[name] = None  # type: ignore[assignment]


def import_megatron_uncompiled() -> None:
    """Import Megatron without its compiled functions, whatever its kernels are."""
    with lean_imports():
        _import_megatron()


def _once(mark: str) -> bool:
    """Whether this process has yet to be patched; marks it."""
    if getattr(torch, mark, False):
        return False
    # What was imported before keeps compiled functions and its own references to what is patched
    # here: such a rank rounds otherwise than its peers, and than itself in its next run.
    ours = any(getattr(torch, other, False) for other in _MARKS)
    early = sorted(name for name in sys.modules if name.startswith("megatron.core."))
    assert ours or not early, f"imported before the backend was prepared: {', '.join(early[:3])}"
    setattr(torch, mark, True)
    return True


_MARKS = ("_moe_train_no_cuda", "_moe_train_no_te")


def _import_megatron() -> None:
    importlib.import_module("megatron.core")
    importlib.import_module("megatron.core.models.gpt.gpt_model")


@contextlib.contextmanager
def local_singletons() -> Iterator[None]:
    """Groups of one rank that Megatron makes inside are local ones.

    It makes them like any other and calls collectives on some, for which NCCL creates a
    communicator with buffers of its own; a gloo group has its threads from the beginning.
    """
    from megatron.core import parallel_state

    plain = parallel_state.create_group

    def create_group(
        ranks: Any, timeout: Any = None, backend: Any = None, pg_options: Any = None, **how: Any
    ) -> Any:
        if len(ranks) == 1:
            backend, pg_options = local_group.NAME, None
        return plain(ranks, timeout, backend, pg_options, **how)

    local_group.register()
    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = plain


@contextlib.contextmanager
def optimizer_built_by(descriptor: Optimizer, optim: OptimConfig) -> Iterator[None]:
    """Megatron's factory knows Adam and, undistributed, SGD; what it wraps them in takes any torch
    optimizer: ``descriptor``'s is built where Adam would be."""
    from megatron.core import optimizer

    plain = optimizer.Adam
    if descriptor.build:
        kind = pkgutil.resolve_name(descriptor.build)
        own = {name: getattr(optim, key) for name, key in descriptor.hyper_parameters.items()}

        def build(params: Any, *, lr: float, weight_decay: float, **_: Any) -> Any:
            return kind(params, lr=lr, weight_decay=weight_decay, **own, **descriptor.constants)

        optimizer.Adam = build
    try:
        yield
    finally:
        optimizer.Adam = plain


@contextlib.contextmanager
def fused_adam_visible() -> Iterator[None]:
    """OptimizerConfig refuses the precision-aware optimizer unless TransformerEngine's
    FusedAdam can be imported and has certain arguments; TorchAdam has them."""
    from moe_train.backend.torch_kernels.adam import TorchAdam

    name = f"{TRANSFORMER_ENGINE}.pytorch.optimizers"
    stand_in = types.ModuleType(name)
    stand_in.FusedAdam = TorchAdam  # type: ignore[attr-defined]
    packages = [TRANSFORMER_ENGINE, f"{TRANSFORMER_ENGINE}.pytorch"]
    added = {package: types.ModuleType(package) for package in packages} | {name: stand_in}
    # Megatron asks for the version once and remembers it: none.
    added[TRANSFORMER_ENGINE].__version__ = "0"  # type: ignore[attr-defined]
    before = {module: sys.modules[module] for module in added if module in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for module in added:
            del sys.modules[module]
        sys.modules.update(before)
