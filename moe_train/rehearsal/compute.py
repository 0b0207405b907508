"""Run operations on CUDA tensors with CPU kernels, over the same memory.

Under ``runtime.c`` the memory of a CUDA tensor is host memory, so torch's CPU kernels can compute
on it and write its values in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from moe_train.rehearsal.substitutes import SUBSTITUTES


def is_cuda(value: Any) -> bool:
    """Whether ``value`` names a GPU."""
    return isinstance(value, torch.device) and value.type == "cuda"


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on the host, over the memory of its CUDA arguments."""
    hosts: dict[int, torch.Tensor] = {}
    given: dict[int, torch.Tensor] = {}
    target: torch.device | None = kwargs.get("device")

    def hosted(value: Any) -> Any:
        nonlocal target
        if isinstance(value, torch.Tensor):
            if value.is_cuda and id(value) not in hosts:
                hosts[id(value)] = on_host(value)
                target = target or value.device
            host = hosts.setdefault(id(value), value)
            given[id(host)] = value
            return host
        if is_cuda(value):
            return torch.device("cpu")
        if isinstance(value, torch.Generator):
            return _generator(value)
        return value

    def devised(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in given:
            return given[id(value)]
        return to_device(value, target) if target is not None and is_cuda(target) else value

    host_args, host_kwargs = tree_map(hosted, (args, kwargs))
    run = SUBSTITUTES.get(func, func)
    if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
        assert target is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.set_state(_generator(_default_generator(target)).get_state())
            result = run(*host_args, **host_kwargs)
    else:
        result = run(*host_args, **host_kwargs)
    for host in hosts.values():
        original = given[id(host)]
        assert host.data_ptr() == original.data_ptr(), f"{func} moved {tuple(original.shape)}"
    return tree_map(devised, result)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the memory of a CUDA tensor; valid as long as that is."""
    storage = tensor.untyped_storage()
    memory = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), torch.device("cpu"), storage.nbytes()
    )
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A new CUDA tensor with the values of a CPU tensor."""
    made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    on_host(made).copy_(tensor)
    return made


def _default_generator(device: torch.device) -> torch.Generator:
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def _generator(generator: torch.Generator) -> torch.Generator:
    """A CPU generator that starts where the device's stands, which moves on."""
    own = torch.Generator()
    offset = generator.get_offset()
    own.manual_seed((generator.initial_seed() + offset) % 2**63)
    generator.set_offset(offset + 4)
    return own
