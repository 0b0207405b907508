"""A training session that stays open between tasks: steps, the update, saves and loads measured.

One at a time in a worker; opening the one that is open costs nothing.
"""

from __future__ import annotations

import gc
import shutil
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from moe_train.data.batches import BatchSource
    from moe_train.run.opening import Session

SAMPLES = 4096
"""Samples that a session's dataset is built for; more are drawn from further epochs."""


class _Open:
    """The worker's session, if there is one."""

    overrides: list[str] | None = None
    stack: ExitStack
    session: Session
    source: BatchSource
    step: int
    base: int = 0
    """Device bytes allocated before it was opened."""


_open = _Open()
_held: list[Any] = []


def open(overrides: list[str]) -> dict[str, Any]:
    """Open a session, unless the one that is open has the same overrides.

    Returns:
        ``seconds`` that it took, ``base_bytes`` that the device held before, and what is known of
        its step: tokens, arithmetic of a token, the device's peak.
    """
    from moe_train.parallel.flops import flops_per_token
    from moe_train.train.metrics import device_peak

    begun = time.perf_counter()
    if _open.overrides != overrides:
        close()
        _open.base = DeviceMemory().peaks().get("allocated_bytes", 0)
        _start(overrides)
    session = _open.session
    config = session.config
    flops = flops_per_token(config.model, config.data.sequence, session.run.vocab)
    return {
        "seconds": time.perf_counter() - begun,
        "base_bytes": _open.base,
        "tokens_per_step": session.run.tokens,
        "flops_per_token": flops.total,
        "peak_flops": device_peak(config),
        "hardware": config.hardware.name,
        "parameters": sum(p.numel() for chunk in session.engine.chunks for p in chunk.parameters()),
        "largest_parameter_bytes": max(
            p.numel() * 4 for chunk in session.engine.chunks for p in chunk.parameters()
        ),
    }


def _start(overrides: list[str]) -> None:
    from moe_train.run.logs import logging_to_console
    from moe_train.run.opening import open_session
    from moe_train.run.resolution import resolve_on_all_ranks
    from moe_train.run_folder.folder import create_run_folder

    run = resolve_on_all_ranks(overrides, 1)
    config = run.config
    folder = create_run_folder(config.run.dir, config.run.name, "session")
    stack = ExitStack()
    try:
        stack.enter_context(logging_to_console())
        session = open_session(run, 0, stack, folder=folder)
        # Only now: they import Megatron, which the backend had to prepare for.
        from moe_train.data.batches import BatchSource
        from moe_train.data.datasets import build_datasets

        dataset = build_datasets(
            config.data,
            sequence=config.data.sequence,
            seed=config.run.seed,
            train_samples=SAMPLES,
            vocab_limit=session.run.vocab,
            corpus=session.corpus,
        ).train
    except BaseException:
        stack.close()
        raise
    _open.source = BatchSource(dataset, session.run.sequences, config.batch.micro, 0, 1)
    _open.overrides, _open.stack, _open.session, _open.step = overrides, stack, session, 0


def close() -> None:
    """Close the open session and free what it and :func:`fill_memory` hold."""
    _held.clear()
    if _open.overrides is not None:
        _open.overrides = None
        stack = _open.stack
        del _open.session, _open.source, _open.stack
        stack.close()
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def take_step() -> None:
    """One training step, as the loop of a run takes it.

    Raises:
        NonFiniteError: the update was skipped, so the step measures nothing.
    """
    from moe_train.train.step import require_finite, train_step

    _open.step += 1
    result = train_step(_open.session.engine, _open.source.next_step(), _open.step)
    require_finite(_open.step, result)
    _open.session.engine.backend.synchronize()


def steps(count: int) -> dict[str, Any]:
    """Seconds of each of ``count`` steps, and the peak of allocated and reserved device memory."""
    watch = DeviceMemory()
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        take_step()
        times.append(time.perf_counter() - begun)
    return {"seconds": times, **watch.peaks()}


def update() -> dict[str, Any]:
    """Device memory and seconds that the optimizer's update adds to a step's state."""
    optimizer = _open.session.engine.optimizer
    plain = optimizer.step_with_ready_grads
    results: dict[str, Any] = {}

    def watched(*args: Any, **how: Any) -> Any:
        _open.session.engine.backend.synchronize()
        watch, begun = DeviceMemory(), time.perf_counter()
        result = plain(*args, **how)
        _open.session.engine.backend.synchronize()
        results.update(seconds=time.perf_counter() - begun, **watch.added())
        return result

    # The first update makes the optimizer's state.
    take_step()
    optimizer.step_with_ready_grads = watched
    try:
        take_step()
    finally:
        del optimizer.step_with_ready_grads
    return results


def save_and_load() -> dict[str, Any]:
    """Save the session's state and load it again: seconds, bytes, added device memory."""
    from moe_train.run.restore import restore
    from moe_train.run.saving import Saver

    if _open.step == 0:
        take_step()
    session = _open.session
    assert session.folder is not None
    root = session.folder.checkpoints
    saver = Saver(session, _open.source)
    watch, begun = DeviceMemory(), time.perf_counter()
    saver.begin(_open.step)
    saver.finish()
    result: dict[str, Any] = {"save_seconds": time.perf_counter() - begun}
    result |= {f"save_{key}": value for key, value in watch.added().items()}
    result["bytes"] = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    watch, begun = DeviceMemory(), time.perf_counter()
    folder, _ = restore(session, root, "auto")
    result["load_seconds"] = time.perf_counter() - begun
    result |= {f"load_{key}": value for key, value in watch.added().items()}
    take_step()
    if folder is not None:
        shutil.rmtree(folder)
    return result


def fill_memory(leave_gb: float) -> float:
    """Allocate the device's memory but ``leave_gb`` (1e9 bytes); returns the GB held."""
    close()
    free, _ = torch.cuda.mem_get_info()
    size = max(0, int(free - leave_gb * 1e9))
    _held.append(torch.empty(size, dtype=torch.uint8, device=torch.cuda.current_device()))
    torch.cuda.synchronize()
    return size / 1e9


class DeviceMemory:
    """The allocator's peaks since this was made; on a CPU there are none."""

    def __init__(self) -> None:
        self._before: int | None = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def peaks(self) -> dict[str, int]:
        """Peak bytes allocated and reserved."""
        if self._before is None:
            return {}
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }

    def added(self) -> dict[str, int]:
        """Peak bytes allocated over what was allocated before."""
        if self._before is None:
            return {}
        return {"added_bytes": torch.cuda.max_memory_allocated() - self._before}
