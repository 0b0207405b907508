"""Kernel rates of one thread (GEMM, grouped GEMM, attention) and memory bandwidth."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.multiprocessing
from scipy.optimize import nnls
from torch.utils.benchmark import Timer

ATTENTION = [(16, 128, 8), (16, 128, 64), (8, 512, 8), (8, 512, 64)]
"""Heads, sequence, head width."""


def median_seconds(work: Callable[[], object], least: float = 0.15) -> float:
    """Median time of one call on one thread, measured for at least ``least`` seconds."""
    timer = Timer("work()", globals={"work": work})
    return float(timer.blocked_autorange(min_run_time=least).median)


def gemm_flops(dtype: torch.dtype, rows: int, width: int = 512) -> float:
    """FLOP/s of [rows, width] x [width, width]."""
    left, right = torch.randn(rows, width).to(dtype), torch.randn(width, width).to(dtype)
    return 2 * rows * width * width / median_seconds(lambda: left @ right)


def grouped_flops(dtype: torch.dtype, rows: int, experts: int = 8, width: int = 256) -> float:
    """FLOP/s of grouped products with ``rows`` rows for each expert."""
    tokens = torch.randn(rows * experts, width).to(dtype)
    weights = torch.randn(experts, width, width).to(dtype)
    ends = torch.arange(1, experts + 1, dtype=torch.int32) * rows
    seconds = median_seconds(lambda: torch._grouped_mm(tokens, weights, offs=ends))
    return 2 * tokens.shape[0] * width * width / seconds


def relative_fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Costs, none negative, of the quantities in ``rows`` that add up to ``seconds``.

    Errors are relative: a short time counts as much as a long one.
    """
    values = np.array(seconds)
    costs: list[float] = nnls(np.array(rows) / values[:, None], np.ones(len(values)))[0].tolist()
    return costs


class Attention(NamedTuple):
    """Causal attention takes flops / flops_per_second + exponentials / exps_per_second."""

    flops_per_second: float
    exps_per_second: float


def attention(dtype: torch.dtype) -> Attention:
    """Fit :class:`Attention` to short and long sequences of small and large heads.

    Of both, the half that is needed is counted.
    """
    attend = torch.nn.functional.scaled_dot_product_attention
    rows, wanted = [], []
    for heads, sequence, width in ATTENTION:
        query = torch.randn(1, heads, sequence, width).to(dtype)
        pairs = heads * sequence * (sequence + 1) / 2
        rows.append([2 * 2 * pairs * width, pairs])
        wanted.append(median_seconds(partial(attend, query, query, query, is_causal=True)))
    per_flop, per_exp = relative_fit(rows, wanted)
    return Attention(1 / max(per_flop, 1e-15), 1 / max(per_exp, 1e-15))


def memory_bytes_per_second(cores: int = 1) -> float:
    """Bytes read and written per second by a copy that no cache holds, while others copy too.

    Args:
        cores: how many copy at once, as the ranks of a step do; the slowest one's rate is given.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_copy, (cores, folder), nprocs=cores)
        return min(float(path.read_text()) for path in Path(folder).glob("*.rate"))


def _copy(rank: int, cores: int, folder: str, megabytes: int = 64) -> None:
    torch.set_num_threads(1)
    source = torch.zeros(megabytes * 250_000)
    target = torch.zeros_like(source)
    (Path(folder) / f"{rank}.ready").touch()
    while len(list(Path(folder).glob("*.ready"))) < cores:
        time.sleep(0.001)
    rate = 2 * source.numel() * 4 / median_seconds(lambda: target.copy_(source), least=0.7)
    (Path(folder) / f"{rank}.rate").write_text(repr(rate))
