"""Process groups of one rank: collectives that copy, without a communicator.

Every layout has some twenty groups of which many have one member, and Megatron calls collectives
on them all the same. With NCCL each would own a communicator with device buffers, with gloo a
thread that polls. torch has no backend for a group of one (its ``fake`` one answers wrongly by its
own word), but takes process groups written in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

NAME = "local"
"""torch.distributed's name of this backend."""


class _Done(dist.Work):
    """Completed work: waiting only orders streams.

    A copy runs on the stream that was current when the collective was called; whoever waits for it
    on another stream has to come after it and after what made its operand, as with NCCL.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._events = []
        for device in {
            tensor.device for tensor in tensors if tensor.device.type not in _WITHOUT_STREAMS
        }:
            self._events.append((device, _stream(device).record_event()))

    def wait(self, timeout: Any = None) -> bool:
        for device, event in self._events:
            _stream(device).wait_event(event)
        return True

    def is_completed(self) -> bool:
        return all(event.query() for _, event in self._events)

    def is_success(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.wait()


_WITHOUT_STREAMS = ("cpu", "meta")
"""Devices without streams."""


def _stream(device: torch.device) -> Any:
    return torch.get_device_module(device).current_stream(device)


_Tensors = torch.Tensor | Sequence[Any]
# The stubs of one version of torch name other methods than those of the next.
_Group: Any = dist.ProcessGroup


class LocalGroup(_Group):  # type: ignore[misc]
    """A group whose one member is this rank.

    Methods have torch's names: those up to 2.11, and those that newer ones call.
    """

    def __init__(self, rank: int, size: int) -> None:
        assert (rank, size) == (0, 1), f"rank {rank} of a local group of {size}"
        super().__init__(rank, size)

    def getBackendName(self) -> str:
        return NAME

    # torch keeps these two in a group's backends, of which this one has none.
    def _set_group_name(self, name: str) -> None:
        self._named = name

    def _set_group_desc(self, description: str) -> None:
        self._described = description

    @property
    def group_name(self) -> str:
        return self._named

    @property
    def group_desc(self) -> str:
        return self._described

    def _in_place(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> dist.Work:
        _refuse_scaling(opts)
        return _Done(tensors)

    allreduce = allreduce_coalesced = reduce = broadcast = _in_place

    def _copy(self, outputs: _Tensors, inputs: _Tensors, opts: Any = None) -> dist.Work:
        """Tensors, lists of them, or a list of one list a rank, in either place."""
        _refuse_scaling(opts)
        return _copied(_flat(outputs), _flat(inputs))

    _allgather_base = all_gather_single = _copy
    _reduce_scatter_base = reduce_scatter_single = _copy
    gather_single = gather_into_tensor = _copy
    allgather_into_tensor_coalesced = all_gather_single_coalesced = _copy
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced = _copy
    allgather = allgather_coalesced = gather = alltoall = reduce_scatter = scatter = _copy

    def alltoall_base(
        self,
        output: torch.Tensor,
        inputs: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        opts: Any = None,
    ) -> dist.Work:
        """All rows stay; split sizes have to be the row count."""
        for splits, tensor in ((output_splits, output), (input_splits, inputs)):
            if splits is not None and list(splits) not in ([], [tensor.shape[0]]):
                raise ValueError(f"splits {list(splits)} of {tensor.shape[0]} rows for one rank")
        return _copied([output], [inputs])

    all_to_all_single = alltoall_base

    def barrier(self, opts: Any = None) -> dist.Work:
        """All ranks have arrived."""
        return _Done(())

    def send(self, *_: Any) -> dist.Work:
        """There is no other rank."""
        raise ValueError("a group of one rank has no peer to send to or receive from")

    recv = recv_anysource = send

    def abort(self) -> None:
        """No work is in flight."""

    shutdown = abort


def _flat(tensors: _Tensors) -> list[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [tensor for each in tensors for tensor in _flat(each)]


def _refuse_scaling(opts: Any) -> None:
    """Every reduction of one operand is that operand, except one that scales."""
    operation = getattr(opts, "reduceOp", None)
    if operation is not None and operation == dist.ReduceOp.PREMUL_SUM:
        raise ValueError("PREMUL_SUM scales its operand, which a group of one rank only copies")


def _copied(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> dist.Work:
    with torch.no_grad():
        for output, tensor in zip(outputs, inputs, strict=True):
            same = output is tensor or (
                output.numel() == tensor.numel()
                and output.is_contiguous()
                and tensor.is_contiguous()
                and output.untyped_storage()._cdata == tensor.untyped_storage()._cdata
                and output.storage_offset() == tensor.storage_offset()
            )
            # The shapes of one rank's part and of the whole may differ in a leading 1.
            if not same:
                output.view(tensor.shape).copy_(tensor)
    return _Done(outputs)


def _create(store: dist.Store, rank: int, size: int, timeout: Any) -> LocalGroup:
    return LocalGroup(rank, size)


def register() -> None:
    """Make the backend known to torch.distributed; a second call changes nothing."""
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, _create, devices=["cpu", "cuda"])
