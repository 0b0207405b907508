"""Latency and bandwidth of gloo's collectives between processes of this machine.

A collective that follows computing costs more than one that follows another, and the more the
longer that took: the others arrive at their own time, threads that wait have to be woken, and what
they need has left the caches, since a layer walks through more weights than those hold. So all are
timed in the order of a layer that exchanges tokens. Results go to new memory, as Megatron's do.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from moe_train.errors import ConfigError
from moe_train.measure.calibrate.kernels import relative_fit

SIZES = (1_024, 65_536, 1_048_576)
ROUNDS, SAMPLES = 5, 5
LAYER = ((30, 3), (15, 1), (60, 1), (30, 2))
"""Products and the calls that follow them, of a layer that takes a core 2 to 3 ms forward (the
twin's; launches are half of it) and twice that backward: attention and router, then counts, rows
and probabilities; experts, then results; backward the next layer's attention, then results;
experts, then rows and probabilities."""
WEIGHTS = 128
"""Of 256 KiB each: more than a core's caches."""


class Links(NamedTuple):
    """A collective in which each rank sends b bytes in k turns: latency + k message + b / rate.

    Gathers and all-to-alls of n ranks have n - 1 turns; all-reduces, which gloo's reduce-scatters
    are, twice as many and twice the bytes.
    """

    latency: float
    message: float
    bytes_per_second: float
    work: float
    """Share of the time in which it keeps a core busy."""


def measure(worlds: tuple[int, ...] = (2, 4)) -> Links:
    """Fit :class:`Links` to all-to-all, gather and scatter between processes.

    Of ranks that have a core each: those that share one take turns on it.
    """
    rows, wanted, busy = [], [], []
    cores = len(os.sched_getaffinity(0))
    for world in sorted({min(world, max(cores, 2)) for world in worlds}):
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "seconds.npy"
            torch.multiprocessing.spawn(_rank, (world, f"{folder}/store", result), nprocs=world)
            if not result.exists():
                raise ConfigError("--calibrate", "the ranks ended without a result", "run it again")
            for turns, sent, seconds, work in np.load(result, allow_pickle=False):
                rows.append([1.0, turns, sent])
                wanted.append(seconds)
                busy.append(work)
    latency, message, per_byte = relative_fit(rows, wanted)
    work = min(1.0, float(sum(busy) / sum(wanted)))
    return Links(latency, message, 1 / max(per_byte, 1e-12), work)


def _rank(rank: int, world: int, store: str, result: Path) -> None:
    from moe_train.backend.cpu.gloo import share_device

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    share_device()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    rows, compute = [], _Compute()
    for size in SIZES:
        for turns, sent, call in _calls(size, world):
            alone = np.median([_layer(compute) for _ in range(SAMPLES)], axis=0)
            both = np.median([_layer(compute, call) for _ in range(SAMPLES)], axis=0)
            calls = sum(count for _, count in LAYER)
            seconds, busy = np.maximum((both - alone) / calls, 1e-6)
            rows.append((turns, sent, seconds, busy))
    if rank == 0:
        np.save(result, np.array(rows))
    dist.barrier()
    dist.destroy_process_group()


def _layer(compute: _Compute, call: Callable[[], object] = lambda: None) -> tuple[float, float]:
    """Seconds of a layer, by the clock and of a core (all threads of this rank).

    A fixed number of rounds, the same on all ranks.
    """
    dist.barrier()
    begun, busy = time.perf_counter(), time.process_time()
    for _ in range(ROUNDS):
        for products, calls in LAYER:
            compute(products)
            for _ in range(calls):
                call()
    passed, used = time.perf_counter() - begun, time.process_time() - busy
    return passed / ROUNDS, used / ROUNDS


class _Compute:
    """Computation between two collectives of a layer: small products with fresh weights."""

    def __init__(self) -> None:
        self._weights = torch.full((WEIGHTS, 256, 256), 1e-3)
        self._next = 0

    def __call__(self, products: int) -> None:
        left = torch.ones(64, 256)
        for _ in range(products):
            left = torch.tanh(left @ self._weights[self._next])
            self._next = (self._next + 1) % WEIGHTS


def _calls(size: int, world: int) -> list[tuple[int, float, Callable[[], object]]]:
    """(turns, bytes that a rank sends, the call) of each collective."""
    whole = torch.zeros(size // 4 // world * world)
    part = torch.zeros(whole.numel() // world)
    turns = world - 1
    sent = whole.numel() * 4 * turns / world
    return [
        (turns, sent, lambda: dist.all_to_all_single(torch.empty_like(whole), whole)),
        (turns, sent, lambda: dist.all_gather_into_tensor(torch.empty_like(whole), part)),
        (2 * turns, 2 * sent, lambda: dist.reduce_scatter_tensor(torch.empty_like(part), whole)),
    ]
