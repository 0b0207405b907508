"""Ranks of any world on fake tensors: the real model of a full-size run in seconds.

torch's ``fake`` process-group backend answers every collective at once and FakeTensorMode holds
no memory, so one process can be any rank of any world: the real model code runs, on sizes that
no machine here could hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from moe_train.backend.groups import close_world, open_groups
from moe_train.backend.protocol import Backend
from moe_train.model import build
from moe_train.parallel.resolved import ResolvedRun
from moe_train.train import engine as engines


@contextlib.contextmanager
def fake_world(rank: int, world: int) -> Iterator[FakeTensorMode]:
    """Be ``rank`` of ``world`` inside the block; tensors made there hold no memory.

    Groups opened inside are closed at the end, so one process can be one rank after the other.
    The machine's backend has to be prepared before.
    """
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    # Leaving a fork compares generator states, and fake tensors have no values to compare.
    no_fork = mock.patch.object(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
    # Coalesced collectives have no fake implementation; one by one they have.
    one_by_one = mock.patch.object(
        param_and_grad_buffer, "_coalescing_manager", lambda *_, **__: _Finished()
    )
    dist.init_process_group(backend="fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with (
            no_fork,
            one_by_one,
            FakeTensorMode(allow_non_fake_inputs=True) as mode,
            _KnownScalars(),
        ):
            yield mode
    finally:
        close_world()


class _KnownScalars(TorchDispatchMode):
    """Answer a tensor's value, such as the gradient norm's, with 1: fake tensors have none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


class _Finished(contextlib.AbstractContextManager["_Finished"]):
    """A batch of collectives that are done as soon as they are called."""

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> None:
        """Nothing to wait for."""


def fake_engine(run: ResolvedRun, backend: Backend) -> engines.Engine:
    """This rank's engine with uninitialised weights; call inside :func:`fake_world`."""
    seed = engines.seed_everything

    def seed_really(number: int) -> None:
        # Generator states must not become fake.
        with unset_fake_temporarily():
            seed(number)

    with (
        mock.patch.object(engines, "seed_everything", seed_really),
        mock.patch.object(build, "initialise", lambda *_: None),
        # Parameters that the mode holds on to cannot be swapped, and are in their place already.
        mock.patch.object(build.GPTModel, "to", lambda model, *_: model),
        mock.patch.object(dist, "all_gather_object", _gather_own),
    ):
        return engines.build_engine(run, backend, open_groups(run.layout, timeout_seconds=60))


def _gather_own(gathered: list[Any], own: Any, group: Any = None) -> None:
    """Every rank's object is like this one's: parameter groups are aligned by their keys alone."""
    gathered[:] = [own] * len(gathered)
