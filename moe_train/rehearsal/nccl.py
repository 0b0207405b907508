"""NCCL process groups of a rehearsal, backed by gloo over the same memory.

torch's own ``nccl`` backend is created and called as on GPUs (options, batches of
point-to-point operations, coalesced collectives); tensors of the host are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._pytree import tree_iter, tree_map

from moe_train.rehearsal.compute import compute
from moe_train.rehearsal.rules import MixedDevices, Recorder

CUDA, HOST = torch.device("cuda"), torch.device("cpu")


class Communicator(dist.ProcessGroupGloo):
    """A gloo group in the place of ``ProcessGroupNCCL``."""

    Options = distributed_c10d.ProcessGroupNCCL.Options  # type: ignore[assignment]
    supports_coalescing = True
    supports_splitting = False
    made: list[Communicator] = []
    """Kept: torch hands out the Python object only as long as it lives."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, options: Any, timeout: Any = None
    ) -> None:
        own = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        own._devices = [_network()]
        own._threads = 1
        own._timeout = timeout or options._timeout
        super().__init__(store, rank, size, own)  # type: ignore[arg-type]
        gloo = dist.ProcessGroup.BackendType.GLOO
        # Torch decides by a group's devices where pickled objects travel: this group has one.
        self.host_group = dist.ProcessGroup(store, rank, size)
        self.host_group._set_default_backend(gloo)
        self.host_group._register_backend(HOST, gloo, self)
        self.batch: list[Any] | None = None
        """Operations since the beginning of a coalesced batch."""
        Communicator.made.append(self)

    def eager_connect_single_device(self, device: torch.device | None = None) -> None:
        """gloo connected when it was created."""


@cache
def _network() -> Any:
    return dist.ProcessGroupGloo.create_default_device()


class _Batch:
    """The work of one coalesced batch."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self, *_: Any) -> bool:
        """Wait for every operation."""
        for work in self._works:
            work.wait()
        return True

    def is_completed(self) -> bool:
        """Whether every operation is done."""
        return all(work.is_completed() for work in self._works)


def _start(group: dist.ProcessGroup, device: torch.device) -> None:
    _communicator(group).batch = []


def _end(group: dist.ProcessGroup, device: torch.device) -> _Batch:
    own = _communicator(group)
    works, own.batch = own.batch, None
    assert works is not None
    return _Batch(works)


def _communicator(group: dist.ProcessGroup) -> Communicator:
    own = group._get_backend(CUDA)
    assert isinstance(own, Communicator), own
    return own


def _create(options: Any, chosen: Any) -> Communicator:
    return Communicator(
        options.store, options.group_rank, options.group_size, chosen, timeout=options.timeout
    )


@contextmanager
def nccl_on_host() -> Iterator[None]:
    """Inside the block, groups of the ``nccl`` backend work without a GPU."""
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(distributed_c10d, "ProcessGroupNCCL", Communicator))
        if hasattr(dist.Backend, "_ensure_backend_registered"):
            # torch 2.15 creates every backend through a plugin, registered on first use.
            plugin = dist.Backend._BackendPlugin(_create, True)
            enter(mock.patch.dict(dist.Backend._plugins, NCCL=plugin))
        enter(mock.patch.object(dist.ProcessGroup, "_start_coalescing", _start))
        enter(mock.patch.object(dist.ProcessGroup, "_end_coalescing", _end))
        yield


_PENDING: list[tuple[Any, Any]] = []
"""Work under way with the tensors that it reads and writes, as NCCL's streams keep them."""


def collective(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one ``c10d`` operation, or refuse it.

    Raises:
        MixedDevices: a tensor on the host in a group of NCCL.
    """
    [group] = [
        dist.ProcessGroup.unbox(value)  # type: ignore[attr-defined]
        for value in tree_iter((args, kwargs))
        if _is_group(value)
    ]
    tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
    own = _registered(group, CUDA)
    if not isinstance(own, Communicator):
        if any(tensor.is_cuda for tensor in tensors):
            # gloo takes them, through the host.
            recorder.copied("gloo")
        return func(*args, **kwargs)
    if _registered(group, HOST) is not None and not any(tensor.is_cuda for tensor in tensors):
        return func(*args, **kwargs)
    if any(not tensor.is_cuda for tensor in tensors):
        raise MixedDevices.of(func, tensors, "a tensor of the host in a collective of NCCL")
    host_args, host_kwargs = tree_map(
        lambda value: own.host_group.boxed() if _is_group(value) else value, (args, kwargs)
    )
    result = compute(func, host_args, host_kwargs)
    _PENDING[:] = [pair for pair in _PENDING if not pair[0].is_completed()]
    for boxed in tree_iter(result):
        if isinstance(boxed, torch.ScriptObject):
            work = dist.Work.unbox(boxed)  # type: ignore[attr-defined]
            _PENDING.append((work, tensors))
            if own.batch is not None:
                own.batch.append(work)
    return result


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def _registered(group: dist.ProcessGroup, device: torch.device) -> Any:
    """The group's backend for a device, or None."""
    return group._get_backend(device) if device in group._device_types else None
