"""One optimizer step under the tracker: every micro-batch and the update, watched.

The same code follows a rank on fake tensors and a rank of a real world.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.transformer_layer import TransformerLayer

from moe_train.checkpoint.optimizer_state import parts
from moe_train.measure.dryrun.tracker import GRADIENTS, OPTIMIZER, WEIGHTS, MemoryTracker, Peak
from moe_train.model.span import schedule as span_schedule
from moe_train.model.span.dispatcher import CrossStageDispatcher
from moe_train.train.engine import Engine
from moe_train.train.forward import MicroBatch
from moe_train.train.step import apply_update, schedule_arguments

UPDATE = "optimizer update"
"""Name of the phase after the last backward pass."""
CLIPPED = 1e9
"""Gradient norm that the update is given: large, so that gradients are clipped."""


@dataclass(frozen=True)
class Watched:
    """One watched step."""

    peak: Peak
    update: int
    """Bytes that gradient norm, clipping and update need beside what is live before them."""


def own_state(tracker: MemoryTracker, engine: Engine) -> None:
    """Mark the storages of weights, gradient buffers and optimizer state."""
    inner = [part.optimizer for part in parts(engine.optimizer)]
    tracker.own(state_tensors(inner), OPTIMIZER)
    for chunk in engine.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            tracker.own([buffer.grad_data], GRADIENTS)
        tracker.own(chunk.parameters(), WEIGHTS)


def state_tensors(inner: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Moments, master copies held as state, and master copies that are updated themselves."""
    for optimizer in inner:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                states = optimizer.state.get(parameter, {})
                yield from (value for value in states.values() if torch.is_tensor(value))


def watched_step(engine: Engine, batches: Sequence[MicroBatch], tracker: MemoryTracker) -> Watched:
    """Run all micro-batches forward and backward, in the engine's schedule, then the update.

    Call inside the tracker, after :func:`own_state`.
    """
    for chunk in engine.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    engine.routing.clear()
    tracker.begin()
    with _phases(engine, tracker), _modules(engine, tracker):
        engine.forward_backward(**schedule_arguments(engine, batches))
    passes, before = tracker.peak(), tracker.live
    update = watched_update(engine, tracker)
    return Watched(max(passes, update, key=lambda peak: peak.bytes), update.bytes - before)


def watched_update(engine: Engine, tracker: MemoryTracker) -> Peak:
    """Run gradient norm, clipping and update, as after the last backward pass."""
    tracker.phase, tracker.module = UPDATE, "optimizer"
    tracker.begin()
    engine.optimizer.prepare_grads()
    engine.optimizer.get_grad_norm()
    apply_update(engine.optimizer, CLIPPED)
    return tracker.peak()


@contextlib.contextmanager
def _phases(engine: Engine, tracker: MemoryTracker) -> Iterator[None]:
    """Name the phase at each forward and backward step of the schedule."""
    chunks, done = len(engine.chunks), {"forward": 0, "backward": 0}

    def named(kind: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            done[kind] += 1
            what = "micro-batch" if chunks == 1 else "chunk"
            tracker.phase, tracker.module = f"{kind} of {what} {done[kind]}", ""
            return plain(*args, **kwargs)

        return step

    begin = CrossStageDispatcher.begin

    def serve(
        self: CrossStageDispatcher, tick: int, active: Any, *, backward: bool, save: bool
    ) -> None:
        tracker.phase, tracker.module = f"tick {tick}, serving", ""
        begin(self, tick, active, backward=backward, save=save)

    with contextlib.ExitStack() as stack:
        for module in (schedules, span_schedule):
            for kind in done:
                name = f"{kind}_step"
                stack.enter_context(
                    mock.patch.object(module, name, named(kind, getattr(module, name)))
                )
        stack.enter_context(mock.patch.object(CrossStageDispatcher, "begin", serve))
        yield


@contextlib.contextmanager
def _modules(engine: Engine, tracker: MemoryTracker) -> Iterator[None]:
    """Follow the module that runs: forward by its calls, backward by its outputs' gradients."""
    entered: list[str] = []

    def enter(module: Any, name: str, *_: Any) -> None:
        entered.append(tracker.module)
        tracker.module = name

    def arrive(name: str, gradient: torch.Tensor) -> None:
        tracker.module = name

    def leave_module(module: Any, name: str, output: Any) -> None:
        tracker.module = entered.pop()
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor) and first.requires_grad:
            first.register_hook(partial(arrive, name))

    handles = []
    for chunk in engine.chunks:
        for module, name in _named(chunk):
            handles.append(module.register_forward_pre_hook(lambda m, _, name=name: enter(m, name)))
            handles.append(
                module.register_forward_hook(
                    lambda m, _, out, name=name: leave_module(m, name, out)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named(chunk: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Modules with names by global layer number, such as ``layer 3 mlp.experts``."""
    layers = {
        name: f"layer {module.layer_number}"
        for name, module in chunk.named_modules()
        if isinstance(module, TransformerLayer)
    }
    for name, module in chunk.named_modules():
        for prefix, layer in layers.items():
            if name == prefix or name.startswith(prefix + "."):
                yield module, " ".join(filter(None, (layer, name[len(prefix) + 1 :])))
                break
        else:
            if name and "layers" not in name.rpartition(".")[2]:
                yield module, name.removeprefix("module.")
