"""Devices of a run's state: parameters, buffers, optimizer and random state must be on the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook


class StateAudit:
    """Knows every module and optimizer that came to be while it was active, by torch's hooks."""

    def __init__(self) -> None:
        self._modules: WeakSet[torch.nn.Module] = WeakSet()
        self._optimizers: WeakSet[torch.optim.Optimizer] = WeakSet()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Record modules and optimizers created inside the block."""

        def built(module: torch.nn.Module, *_: Any) -> None:
            self._modules.add(module)

        def steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self._optimizers.add(optimizer)

        handles = [
            register_module_parameter_registration_hook(built),
            register_module_buffer_registration_hook(built),
            register_optimizer_step_pre_hook(steps),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def misplaced(self) -> Iterator[str]:
        """What a save would take as readily as the rest, though it is not the device's.

        Parameters, buffers and optimizer state in host memory, and random states that the device's
        generator does not accept.
        """
        for module in list(self._modules):
            for name, tensor in _saved(module):
                if not tensor.is_cuda:
                    yield f"{type(module).__name__}.{name} of shape {tuple(tensor.shape)}"
        for optimizer in list(self._optimizers):
            for state in optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and not value.is_cuda:
                        yield f"optimizer state {name} of shape {tuple(value.shape)}"
        size = torch.cuda.get_rng_state().numel()
        for name, state in get_cuda_rng_tracker().get_states().items():
            if state.numel() != size:
                yield f"random state {name} of {state.numel()} bytes instead of {size}"


def _saved(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer
