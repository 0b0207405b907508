"""Dispatch mode that computes every CUDA kernel with CPU kernels.

Under ``runtime.c`` the memory of a CUDA tensor is host memory. A dispatch mode sees each operation
below autograd; what launches a kernel is run by torch's CPU kernel on CPU tensors over the same
memory, everything else (views, allocation, resizing) by torch's CUDA code itself. Each operation
is judged by :mod:`moe_train.rehearsal.rules` first, as a GPU would take it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from moe_train.rehearsal.compute import compute, is_cuda
from moe_train.rehearsal.nccl import collective
from moe_train.rehearsal.rules import Recorder, judge

NATIVE = {
    "_pin_memory", "_reshape_alias", "_unsafe_view", "empty", "empty_like", "empty_strided",
    "is_pinned", "lift", "lift_fresh", "new_empty", "new_empty_strided", "record_stream", "resize_",
    "set_",
}  # fmt: skip
"""Operations beside views that launch no kernel: torch's CUDA code runs them."""


class HostKernels(TorchDispatchMode):
    """Compute CUDA tensors' operations on the host while active in this thread.

    Args:
        recorder: counts copies to the host and operations that a GPU would refuse.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return collective(self._recorder, func, args, kwargs)
        if not _on_device(args, kwargs):
            return func(*args, **kwargs)
        judge(self._recorder, func, args, kwargs)
        changes_shape = torch.Tag.inplace_view in func.tags
        if func.is_view or changes_shape or func._opname in NATIVE:
            return func(*args, **kwargs)
        return compute(func, args, kwargs)


def _on_device(args: Any, kwargs: dict[str, Any]) -> bool:
    return any(
        value.is_cuda if isinstance(value, torch.Tensor) else is_cuda(value)
        for value in tree_iter((args, kwargs))
    )


@contextmanager
def in_every_thread(recorder: Recorder) -> Iterator[None]:
    """Host kernels in this thread and in every one that is started inside the block.

    Dispatch modes belong to a thread; torch's own threads for backward passes inherit theirs.
    """
    run = threading.Thread.run

    def inside(thread: threading.Thread) -> None:
        with HostKernels(recorder):
            run(thread)

    with mock.patch.object(threading.Thread, "run", inside), HostKernels(recorder):
        yield
