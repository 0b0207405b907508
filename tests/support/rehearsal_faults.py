"""Mistakes of the kind that only a GPU shows, planted into one rank's process.

Each function wraps a function of Megatron or ours so that the mistake happens where a programmer
would make it; :mod:`moe_train.rehearsal` has to find every one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _after(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Let ``change(result, *args)`` make the result of ``owner.name``."""
    plain = getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(plain(*args, **kwargs), *args)

    setattr(owner, name, changed)


def router_tensor() -> None:
    """A tensor that the router makes without naming the device."""
    from megatron.core.transformer.moe.router import TopKRouter

    _after(TopKRouter, "gating", lambda logits, *_: logits + torch.zeros(logits.shape))


def optimizer_state() -> None:
    """A moment that is created on the host."""
    from moe_train.backend.torch_kernels.adam import TorchAdam

    def moved(_: None, optimizer: Any, param: torch.Tensor, *rest: Any) -> None:
        state = optimizer.state[param]
        state["exp_avg"] = state["exp_avg"].cpu()

    _after(TorchAdam, "initialize_state", moved)


def rng_state() -> None:
    """A state of the host's generator among the device's."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from moe_train.train import engine

    def replaced(_: None, *__: Any) -> None:
        tracker = get_cuda_rng_tracker()
        states = tracker.get_states()
        tracker.set_states(states | {next(iter(states)): torch.get_rng_state()})

    _after(engine, "seed_everything", replaced)


def saved_state() -> None:
    """A weight that is on the host by the time of a save."""
    from moe_train.train import loop

    def moved(result: Any, engine: Any, *_: Any) -> Any:
        weight = engine.chunks[0].module.output_layer.weight
        weight.data = weight.data.cpu()
        return result

    _after(loop, "train_step", moved)


def host_index() -> None:
    """Rows picked by an index tensor of the host."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    def picked(result: Any, *_: Any) -> Any:
        output, bias = result
        return output[torch.arange(output.shape[0])], bias

    _after(MoELayer, "forward", picked)


def layer_item() -> None:
    """A number that every layer reads back."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    def read(result: Any, *_: Any) -> Any:
        assert result[0].abs().max().item() < 1e9
        return result

    _after(MoELayer, "forward", read)


def host_collective() -> None:
    """A reduction over NCCL of a number that never left the host."""
    import torch.distributed as dist

    from moe_train.train import step

    def reduced(result: Any, *_: Any) -> Any:
        dist.all_reduce(torch.ones(1))
        return result

    _after(step, "reduce_step_stats", reduced)


def wrong_device() -> None:
    """A second slot's thread that does not take the rank's device."""
    import contextlib

    from moe_train.backend import device as threads
    from moe_train.model.span import interleave as turns

    turns.select_device = lambda device: None  # type: ignore[attr-defined]
    threads.ThreadState.entered = lambda self: contextlib.nullcontext()  # type: ignore[method-assign,assignment,return-value]
