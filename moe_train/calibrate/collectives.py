"""Time of gloo's collectives between processes of this machine, between pieces of computing.

A collective that follows computing costs more than one that follows another: the others arrive at
their own time, and threads that wait have to be woken on cores that are busy.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from scipy.optimize import nnls

from moe_train.errors import ConfigError

SIZES = (1_024, 65_536, 1_048_576)
CALLS, SAMPLES = 40, 5


class Links(NamedTuple):
    """A collective in which each rank sends b bytes in k turns: latency + k message + b / rate.

    Gathers and all-to-alls of n ranks have n - 1 turns; all-reduces, which gloo's reduce-scatters
    are, twice as many and twice the bytes.
    """

    latency: float
    message: float
    bytes_per_second: float


def measure(worlds: tuple[int, ...] = (2, 4)) -> Links:
    """Fit :class:`Links` to all-to-all, gather and scatter between processes.

    Ranks that share cores take turns on them, so a call's time is counted times cores / ranks
    there: what one rank costs.
    """
    rows, wanted = [], []
    cores = len(os.sched_getaffinity(0))
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "seconds.npy"
            torch.multiprocessing.spawn(_rank, (world, f"{folder}/store", found), nprocs=world)
            if not found.exists():
                raise ConfigError("--calibrate", "the ranks ended without a result", "run it again")
            for turns, sent, seconds in np.load(found, allow_pickle=False):
                rows.append([1.0, turns, sent])
                wanted.append(seconds * min(1.0, cores / world))
    matrix, values = np.array(rows), np.array(wanted)
    # Relative errors: a small message's time counts as much as a large one's.
    (latency, message, per_byte), _ = nnls(matrix / values[:, None], np.ones(len(values)))
    return Links(float(latency), float(message), float(1 / max(per_byte, 1e-12)))


def _rank(rank: int, world: int, store: str, result: Path) -> None:
    from moe_train.backend.host.gloo import share_device

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    share_device()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    rows = []
    for size in SIZES:
        for turns, sent, call in _calls(size, world):
            alone = [_per_call(_compute) for _ in range(SAMPLES)]
            both = [_per_call(_compute, call) for _ in range(SAMPLES)]
            rows.append(
                (turns, sent, max(statistics.median(both) - statistics.median(alone), 1e-6))
            )
    if rank == 0:
        np.save(result, np.array(rows))
    dist.barrier()
    dist.destroy_process_group()


def _per_call(*work: Callable[[], object]) -> float:
    """Seconds of one round of ``work``; a fixed number of rounds, the same on all ranks."""
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(CALLS):
        for each in work:
            each()
    return (time.perf_counter() - begun) / CALLS


def _compute() -> None:
    """About what lies between two collectives of a layer: small products and their launches."""
    left = torch.ones(64, 256)
    for _ in range(10):
        left = torch.tanh(left @ _WEIGHT)


_WEIGHT = torch.full((256, 256), 1e-3)


def _calls(size: int, world: int) -> list[tuple[int, float, Callable[[], object]]]:
    """(turns, bytes that a rank sends, the call) of each collective."""
    whole = torch.zeros(size // 4 // world * world)
    other, part = torch.empty_like(whole), torch.empty(whole.numel() // world)
    turns = world - 1
    sent = whole.numel() * 4 * turns / world
    return [
        (turns, sent, lambda: dist.all_to_all_single(other, whole)),
        (turns, sent, lambda: dist.all_gather_into_tensor(other, part)),
        (2 * turns, 2 * sent, lambda: dist.reduce_scatter_tensor(part, whole)),
    ]
