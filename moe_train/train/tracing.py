"""Traces one training step of a rank in the Trace Event Format (``train.trace=true``).

A forward pass is traced where Megatron's schedule, whichever it is, calls the forward function; a
hook on its output marks where that micro-batch's backward pass begins. Collectives are traced at
torch's process groups, whose methods return works that are measured while the rank waits for them.
Nothing is wrapped outside that step.

torch.profiler cannot do this part: it knows neither micro-batches, chunks and ticks, nor which of
Megatron's groups a collective belongs to, and it reports an asynchronous collective from start to
end, not the waiting. What it is better at, kernels and their overlap, ``train.profile_steps``
leaves to it; the regions traced here are named in its profile as well.

On devices that run ahead of the program every event waits for the device at both ends, so a traced
step is slower than others and shows no overlap.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from moe_train.run_folder.trace_events import Event, trace_event

GROUP_CATEGORIES = {
    "ep": "exchange", "mp": "exchange", "tp_ep": "exchange", "expt_tp": "tensor", "tp": "tensor",
    "tp_cp": "tensor", "cp": "tensor", "pp": "p2p", "dp": "gradients", "dp_cp": "gradients",
    "expt_dp": "gradients", "intra_expt_dp": "gradients", "intra_dp_cp": "gradients",
}  # fmt: skip
"""Category of a collective by the name of its group in Megatron's collection; else `other`."""

COLLECTIVES = {
    "all_to_all_single": "all-to-all", "alltoall_base": "all-to-all", "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce", "all_gather_single": "all-gather",
    "_allgather_base": "all-gather", "allgather": "all-gather",
    "reduce_scatter_single": "reduce-scatter", "_reduce_scatter_base": "reduce-scatter",
    "broadcast": "broadcast", "send": "send", "recv": "receive", "_end_coalescing": "messages",
}  # fmt: skip
"""Methods of torch's ProcessGroup that start something; a version of torch has some of them."""


class Tracer:
    """Traces one step; in all others a region is only named for torch.profiler.

    Args:
        stage: this rank's pipeline stage.
        synchronize: waits until queued device work is done.
    """

    def __init__(self, stage: int = 0, synchronize: Callable[[], None] = lambda: None) -> None:
        self.stage, self._synchronize = stage, synchronize
        self.target: int | None = None
        """Step to trace."""
        self.step: int | None = None
        """Step that was traced, once it is done."""
        self.events: list[Event] = []
        self._tracing = False
        self._zero = 0.0
        self._thread = threading.get_ident()
        self._categories: dict[str, str] = {}

    def set_groups(self, groups: Any) -> None:
        """Read from Megatron's collection which category each group belongs to."""
        for name, category in GROUP_CATEGORIES.items():
            group = getattr(groups, name, None)
            if isinstance(group, dist.ProcessGroup) and group.size() > 1:
                self._categories.setdefault(group.group_name, category)

    @contextmanager
    def trace(self, step: int) -> Iterator[None]:
        """Trace what happens inside, if `step` is the target; call on every rank."""
        if step != self.target:
            yield
            return
        # All ranks leave the barrier together: the best common zero that clocks of several
        # machines have.
        dist.barrier()
        self._zero, self._thread = self._now(), threading.get_ident()
        # As the class holds them: getattr would give functions that no longer bind when restored.
        methods = {
            name: method for name, method in vars(dist.ProcessGroup).items() if name in COLLECTIVES
        }
        for name, method in methods.items():
            setattr(dist.ProcessGroup, name, self._traced(COLLECTIVES[name], method))
        self._tracing = True
        try:
            yield
        finally:
            self._tracing = False
            for name, method in methods.items():
                setattr(dist.ProcessGroup, name, method)
        self.step = step

    @contextmanager
    def region(self, name: str, category: str, **args: Any) -> Iterator[None]:
        """An event around what happens inside."""
        with record_function(name):
            start = self._now() if self._tracing else 0.0
            yield
            if self._tracing:
                self._add(name, category, start, args)

    def around(self, name: str, category: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with a region around each call."""

        @wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            with self.region(name, category):
                return function(*args, **kwargs)

        return traced

    def passes(
        self, function: Callable[..., Any], chunks: list[torch.nn.Module]
    ) -> Callable[..., Any]:
        """The schedule's forward function, with an event for each forward and backward pass.

        A chunk's micro-batches come in their order, so counting calls numbers them.
        """
        if not self._tracing and not torch.autograd._profiler_enabled():
            return function
        numbers = {id(chunk): index for index, chunk in enumerate(chunks)}
        calls: Counter[int] = Counter()

        def traced(batches: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            chunk = numbers[id(model)]
            position = {"microbatch": calls[chunk], "chunk": chunk}
            calls[chunk] += 1
            with self.region(f"F{position['microbatch']}", "forward", **position):
                output, loss = function(batches, model, *args, **kwargs)
            if self._tracing:
                output.register_hook(partial(self._backward, position))
            return output, loss

        return traced

    def _backward(self, position: Mapping[str, Any], gradient: torch.Tensor) -> None:
        """Called with the gradient of a pass's output; the event ends with autograd's engine."""
        start = self._now()

        def done() -> None:
            self._add(f"B{position['microbatch']}", "backward", start, position)

        torch.autograd.Variable._execution_engine.queue_callback(done)

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _add(self, name: str, category: str, start: float, args: Mapping[str, Any]) -> None:
        seconds = self._now() - start
        # A second thread where halves of a tick are interleaved, or a device has its own.
        track = int(threading.get_ident() != self._thread)
        self.events.append(
            trace_event(
                name, category, start - self._zero, seconds, 0, {"stage": self.stage, **args}, track
            )
        )

    def _traced(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of ProcessGroup whose works are traced while they are waited for."""

        def start(group: Any, *args: Any, **kwargs: Any) -> Any:
            work = method(group, *args, **kwargs)
            if work is None:
                return None
            category = self._categories.get(group.group_name, "other")
            return _TracedWork(work, partial(self.region, name, category, bytes=_bytes(args)))

        return start


class _TracedWork:
    """A work of torch.distributed with a region around its waiting."""

    def __init__(self, work: Any, region: Callable[[], Any]) -> None:
        self._work, self._region = work, region

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait as the work does."""
        with self._region():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _bytes(args: tuple[Any, ...]) -> int:
    """Bytes that a rank sends: of the last of a call's leading tensors (or lists of them)."""
    sent: list[torch.Tensor] = []
    for value in args[:2]:
        parts = value if isinstance(value, list) else [value]
        if parts and all(isinstance(part, torch.Tensor) for part in parts):
            sent = parts
    return sum(part.numel() * part.element_size() for part in sent)
