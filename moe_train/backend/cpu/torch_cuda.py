"""torch.cuda on a CPU: what Megatron calls there, with streams and events that run in order.

The tables below name every replacement and its reason; `moe_train.backend.patches` applies them.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")


def _no_wait(*_: Any, **__: Any) -> None:
    """CPU work is done when it returns, so there is nothing to wait for."""


def _is_done(*_: Any) -> bool:
    return True


class CpuEvent:
    """torch.cuda.Event on a CPU: always complete."""

    wait = synchronize = _no_wait
    query = _is_done

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        """Store the time, for :meth:`elapsed_time`."""
        self._at = time.perf_counter()

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds between two records."""
        return (end._at - self._at) * 1e3


class CpuStream:
    """torch.cuda.Stream on a CPU: work runs at once, in the order of the program."""

    device_index = 0
    cuda_stream = 0
    wait_stream = wait_event = synchronize = _no_wait
    query = _is_done

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority, as CUDA reports them."""
        return 0, 0

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """Record and return an event."""
        event = event or CpuEvent()
        event.record(self)
        return event


DEFAULT_STREAM = CpuStream()


def current_stream(device: Any = None) -> CpuStream:
    """The only stream of a CPU."""
    return DEFAULT_STREAM


@contextlib.contextmanager
def stream_context(stream: Any) -> Iterator[None]:
    """Run the block at once, whatever the stream."""
    yield


# Names under torch.cuda that are replaced on a CPU: name -> (replacement, reason).
CUDA_CALLS: dict[str, tuple[Any, str]] = {
    "current_device": (lambda: CPU, "factories are called with device=current_device()"),
    "set_device": (lambda device: None, "there is one CPU device"),
    "synchronize": (lambda device=None: None, "CPU work is done when it returns"),
    "empty_cache": (lambda: None, "the CPU allocator has no cache to return"),
    "Stream": (CpuStream, "dispatcher, shared experts and DDP own side streams"),
    "Event": (CpuEvent, "combined 1F1B orders its two streams by events"),
    "current_stream": (current_stream, "waited on before and after side streams"),
    "stream": (stream_context, "side streams run at once"),
    "get_rng_state": (lambda device=None: torch.get_rng_state(), "a CPU has one generator"),
    "set_rng_state": (
        lambda state, device=None: torch.set_rng_state(state),
        "a CPU has one generator",
    ),
    # torch.manual_seed itself calls torch.cuda.manual_seed_all, so calling it here would recurse.
    "manual_seed": (
        lambda seed: torch.default_generator.manual_seed(int(seed)),
        "the RNG tracker seeds its states through CUDA",
    ),
    "random.get_rng_state": (lambda device=None: torch.get_rng_state(), "as get_rng_state"),
    "nvtx.range_push": (lambda *args, **kwargs: None, "NVTX ranges are of a GPU profiler"),
    "nvtx.range_pop": (lambda *args, **kwargs: None, "NVTX ranges are of a GPU profiler"),
}

# Names under torch.cuda that tell the truth, or do no harm, without a GPU.
CUDA_UNTOUCHED: dict[str, str] = {
    "is_available": "guards what needs a GPU",
    "device_count": "guards what needs a GPU",
    "OutOfMemoryError": "an exception class that is never raised here",
    "FloatTensor": "a type that is compared with",
    "HalfTensor": "a type that is compared with",
    "BFloat16Tensor": "a type that is compared with",
    "amp.custom_fwd": "a decorator that only looks at autocast",
    "amp.custom_bwd": "a decorator that only looks at autocast",
}

# torch factories whose device argument may be the literal "cuda" inside Megatron.
FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
# Tensor methods that are replaced; `type` because of comparisons with torch.cuda.FloatTensor.
TENSOR_METHODS = ("cuda", "record_stream", "to", "type")


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return call


def patch_torch() -> None:
    """Replace all of the above in torch; call once, before Megatron is imported."""
    for name, (replacement, _) in CUDA_CALLS.items():
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, torch.cuda), last, replacement)
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]

    plain_type, plain_to = torch.Tensor.type, torch.Tensor.to

    # Megatron's optimizers sort parameters by comparing type() with torch.cuda names.
    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return plain_type(self).replace("torch.", "torch.cuda.", 1)
        return plain_type(self, dtype, *args, **kwargs)

    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], (str, torch.device)) and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return plain_to(self, *args, **kwargs)

    torch.Tensor.type = tensor_type  # type: ignore[method-assign,assignment]
    torch.Tensor.to = tensor_to  # type: ignore[method-assign,assignment]
