"""Device rules of CUDA operations: mixed devices, host synchronisations.

Fake or host tensors take operands that a GPU does not: operands of two devices, index tensors and
optimizer steps on the host, host tensors in a collective of NCCL. The exceptions are torch's own:
a host tensor of no dimensions serves as a number in pointwise operations, and copies go anywhere.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_iter

from moe_train.rehearsal.audit import StateAudit

COPIES = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}
"""Operations that may read one device and write another."""

READS = {
    "_local_scalar_dense": "item",
    "_unique2": "unique",
    "bincount": "bincount",
    "equal": "equal",
    "is_nonzero": "item",
    "masked_select": "masked_select",
    "nonzero": "nonzero",
    "nonzero_static": "",
    "unique_consecutive": "unique",
    "unique_dim": "unique",
}
"""Operations whose result, or its shape, the host has to read."""

NUMBERS = {"fill_", "index_fill_", "masked_fill", "masked_fill_"}
"""Operations, beside pointwise ones, with an operand that may be a number on the host."""

INDEXED = {"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"}
"""Operations to which torch copies host indices by itself, and waits."""


class MixedDevices(RuntimeError):
    """An operation that a GPU would refuse; torch's own error is a RuntimeError too."""

    @classmethod
    def of(cls, func: Any, tensors: list[torch.Tensor], what: str) -> MixedDevices:
        """The error for ``func`` at its place in the program."""
        event = _event(what)
        shown = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors[:6])
        return cls(f"{event.place}, {event.source}: {func} takes {what}: {shown}")


@dataclass(frozen=True)
class Event:
    """A copy or a finding: what, in which part of the program, where in the source."""

    kind: str
    place: str
    source: str


KERNELS = "moe_train/backend/torch_kernels/"

PLACES = {
    "layer": (
        *(f"megatron/core/{part}" for part in ("fusions", "models", "tensor_parallel",
                                               "transformer")),
        *(KERNELS + name for name in ("attention", "grouped", "products", "provider")),
        "moe_train/model",
    ),
    "save": ("moe_train/checkpoint/save",),
    "load": ("moe_train/checkpoint",),
    "update": ("megatron/core/optimizer/distrib_optimizer", KERNELS + "adam"),
    "schedule": ("megatron/core/pipeline_parallel", "moe_train/model/span/schedule",
                 "moe_train/train/forward"),
    "build": ("moe_train/train/engine",),
    "step end": ("moe_train/train",),
    "start": ("moe_train/run/", "moe_train/backend"),
}  # fmt: skip
"""Parts of the program by their files; the first match on the stack counts."""


@dataclass
class Recorder:
    """What happened in one rank, counted."""

    copies: Counter[Event] = field(default_factory=Counter)
    """Reads of the device that the host waits for, or has to wait for later."""
    findings: Counter[Event] = field(default_factory=Counter)
    """What a GPU takes and should not have to: host indices, state on the host, another device
    current."""
    audit: StateAudit = field(default_factory=StateAudit)
    """Queried when the first save begins."""
    _saving: bool = False

    def copied(self, kind: str) -> None:
        """Count a copy to the host."""
        event = _event(kind)
        self.copies[event] += 1
        if event.place == "save" and not self._saving:
            self._saving = True
            for name in self.audit.misplaced():
                misplaced = Event(f"{name} is not the device's", event.place, event.source)
                self.findings[misplaced] += 1

    def add_finding(self, kind: str) -> None:
        """Count a finding."""
        self.findings[_event(kind)] += 1


def _event(kind: str) -> Event:
    frames = [
        (frame.f_code.co_filename, number)
        for frame, number in traceback.walk_stack(sys._getframe(2))
    ]
    names = [name for name, _ in frames]
    inside = torch._C._current_graph_task_id() != -1
    place = next(
        (
            place
            for place, files in PLACES.items()
            if any(part in name for name in names for part in files)
        ),
        "layer" if inside else "elsewhere",
    )
    ours = (
        f"{'/'.join(name.split('/')[-3:])}:{number}"
        for name, number in frames
        if ("moe_train/" in name or "megatron/" in name) and "moe_train/rehearsal/" not in name
    )
    return Event(kind, place, next(ours, "elsewhere"))


def judge(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what a GPU would, and count what it makes the host wait for.

    Raises:
        MixedDevices: operands of several devices, where torch on CUDA wants one.
    """
    name = func._opname
    tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    if name in COPIES:
        _judge_copy(recorder, tensors, kwargs)
        return
    if len(devices) > 1:
        raise MixedDevices.of(func, tensors, "operands of several GPUs")
    if READS.get(name):
        recorder.copied(READS[name])
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        recorder.copied(name)
    own = torch.device("cuda", torch.cuda.current_device())
    if devices and devices != {own} and not func.is_view:
        recorder.add_finding(f"{own} is current, operands are on {devices.pop()}")
    if any(tensor.device.type == "cpu" for tensor in tensors):
        _judge_host(recorder, func, args, tensors)
    for value in tree_iter((args, kwargs)):
        if isinstance(value, torch.Generator) and value.device.type != "cuda":
            raise MixedDevices.of(func, tensors, "a generator of the host for tensors of a GPU")
    for index in _indices(name, args):
        if index.dtype in (torch.bool, torch.uint8):
            recorder.copied("index by mask")


def _judge_copy(recorder: Recorder, tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
    if len(tensors) == 2:
        to, source = tensors
        downward = source.is_cuda and to.device.type == "cpu"
    else:
        device = kwargs.get("device")
        downward = tensors[0].is_cuda and device is not None and device.type == "cpu"
    if downward:
        recorder.copied("copy")


def _judge_host(recorder: Recorder, func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    name = func._opname
    if func.is_view or not any(tensor.is_cuda for tensor in tensors):
        return
    hosted = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if name in INDEXED:
        indices = _indices(name, args)
        others = [one for one in hosted if all(one is not index for index in indices)]
        if any(one.dim() for one in others) or not args[0].is_cuda:
            raise MixedDevices.of(func, tensors, "values on the host")
        if any(index.device.type == "cpu" for index in indices):
            recorder.add_finding(f"{name} with an index on the host")
        return
    pointwise = torch.Tag.pointwise in func.tags or name in NUMBERS
    written = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.is_write and isinstance(value, torch.Tensor)
    ]
    if pointwise and not any(one.dim() for one in hosted) and all(one.is_cuda for one in written):
        return
    raise MixedDevices.of(func, tensors, "an operand on the host")


def _indices(name: str, args: Any) -> list[torch.Tensor]:
    if name not in INDEXED:
        return []
    return [index for index in args[1] if isinstance(index, torch.Tensor)]
