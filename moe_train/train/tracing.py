"""What one step really did, as spans of one rank's clock; for ``train.trace=true``.

Passes are seen where Megatron's schedules call for them, whichever schedule it is: the forward
function is wrapped, and a hook on its output marks where that micro-batch's backward pass begins.
Collectives are seen at torch's process groups: for the length of the step their methods return
works whose waiting is measured. Outside that step nothing is wrapped.

On devices that run ahead of the program every span's ends wait for the device, so a traced step is
slower than others and shows no overlap.
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

from moe_train.planner.schedule.chrome import Event, span

KINDS = {
    "ep": "exchange", "mp": "exchange", "tp_ep": "exchange", "expt_tp": "tensor", "tp": "tensor",
    "tp_cp": "tensor", "cp": "tensor", "pp": "p2p", "dp": "gradients", "dp_cp": "gradients",
    "expt_dp": "gradients", "intra_expt_dp": "gradients", "intra_dp_cp": "gradients",
}  # fmt: skip
"""Category of a collective by the name of its group in Megatron's collection; else `other`."""

METHODS = {
    "all_to_all_single": "all-to-all", "alltoall_base": "all-to-all", "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce", "all_gather_single": "all-gather",
    "_allgather_base": "all-gather", "allgather": "all-gather",
    "reduce_scatter_single": "reduce-scatter", "_reduce_scatter_base": "reduce-scatter",
    "broadcast": "broadcast", "send": "send", "recv": "receive", "_end_coalescing": "messages",
}  # fmt: skip
"""Methods of torch's ProcessGroup that start something; a version of torch has some of them."""


class Tracer:
    """Records the spans of one step; costs nothing in all the others.

    Args:
        stage: this rank's pipeline stage.
        synchronize: waits until queued device work is done.
    """

    def __init__(self, stage: int = 0, synchronize: Callable[[], None] = lambda: None) -> None:
        self.stage, self._synchronize = stage, synchronize
        self.target: int | None = None
        """Step to record."""
        self.step: int | None = None
        """Step that was recorded, once it is done."""
        self.events: list[Event] = []
        self._recording = False
        self._zero = 0.0
        self._home = threading.get_ident()
        self._categories: dict[str, str] = {}

    def know_groups(self, groups: Any) -> None:
        """Learn what each group of Megatron's collection is for."""
        for name, category in KINDS.items():
            group = getattr(groups, name, None)
            if isinstance(group, dist.ProcessGroup) and group.size() > 1:
                self._categories.setdefault(group.group_name, category)

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Record what happens inside, if `step` is the target; call on every rank."""
        if step != self.target:
            yield
            return
        # All ranks leave the barrier together: the best common zero that clocks of several
        # machines have.
        dist.barrier()
        self._zero, self._home = self._now(), threading.get_ident()
        self._recording = True
        try:
            with self._waiting_seen():
                yield
        finally:
            self._recording = False
        self.step = step

    @contextmanager
    def region(self, name: str, category: str, **facts: Any) -> Iterator[None]:
        """A span around what happens inside."""
        if not self._recording:
            yield
            return
        start = self._now()
        yield
        self._add(name, category, start, facts)

    def around(self, name: str, category: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with a span around each call."""

        @wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            with self.region(name, category):
                return function(*args, **kwargs)

        return traced

    def passes(
        self, function: Callable[..., Any], chunks: list[torch.nn.Module]
    ) -> Callable[..., Any]:
        """The schedules' forward function, seen forward and backward.

        A chunk's micro-batches come in their order, so counting calls numbers them.
        """
        if not self._recording:
            return function
        numbers = {id(chunk): index for index, chunk in enumerate(chunks)}
        seen: Counter[int] = Counter()

        def traced(batches: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            chunk = numbers[id(model)]
            facts = {"microbatch": seen[chunk], "chunk": chunk}
            seen[chunk] += 1
            with self.region(f"F{facts['microbatch']}", "forward", **facts):
                output, loss = function(batches, model, *args, **kwargs)
            output.register_hook(partial(self._backward, facts))
            return output, loss

        return traced

    def _backward(self, facts: Mapping[str, Any], gradient: torch.Tensor) -> None:
        """Called when the gradient of a pass's output is there; ends when the engine is done."""
        start = self._now()

        def done() -> None:
            self._add(f"B{facts['microbatch']}", "backward", start, facts)

        torch.autograd.Variable._execution_engine.queue_callback(done)

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _add(self, name: str, category: str, start: float, facts: Mapping[str, Any]) -> None:
        seconds = self._now() - start
        whole = {"stage": self.stage, **facts}
        # Two threads only where two halves of a tick take turns, or a device has its own.
        track = int(threading.get_ident() != self._home)
        self.events.append(span(name, category, start - self._zero, seconds, 0, whole, track))

    @contextmanager
    def _waiting_seen(self) -> Iterator[None]:
        """Every process group's works are ours, whoever starts them."""
        # As the class holds them: getattr would give functions that no longer bind when put back.
        held = vars(dist.ProcessGroup)
        kept = {method: held[method] for method in METHODS if method in held}
        for method, function in kept.items():
            setattr(dist.ProcessGroup, method, self._starting(METHODS[method], function))
        try:
            yield
        finally:
            for method, function in kept.items():
                setattr(dist.ProcessGroup, method, function)

    def _starting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def start(group: Any, *args: Any, **kwargs: Any) -> Any:
            work = function(group, *args, **kwargs)
            if work is None:
                return None
            category = self._categories.get(group.group_name, "other")
            return _Seen(work, partial(self.region, name, category, bytes=_bytes(args)))

        return start


class _Seen:
    """A work of torch's whose waiting is recorded."""

    def __init__(self, work: Any, region: Callable[[], Any]) -> None:
        self._work, self._region = work, region

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait as the work does."""
        with self._region():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _bytes(args: tuple[Any, ...]) -> int:
    """Bytes of what a rank puts in: the last of a call's leading tensors (or lists of them)."""
    given: list[torch.Tensor] = []
    for value in args[:2]:
        parts = value if isinstance(value, list) else [value]
        if parts and all(isinstance(part, torch.Tensor) for part in parts):
            given = parts
    return sum(part.numel() * part.element_size() for part in given)
