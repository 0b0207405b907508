"""Set-up of a dry run: the CPU backend, one rank per stage."""

from __future__ import annotations

import warnings

from moe_train.backend.cpu.backend import CpuBackend
from moe_train.config.root import Config
from moe_train.parallel.layout import Layout


def cpu_backend(config: Config) -> CpuBackend:
    """The CPU backend, prepared: a dry run needs no device."""
    backend = CpuBackend(config.backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend.prepare()
    # Megatron tells of missing kernels and of deprecations while it builds: not news here.
    warnings.filterwarnings("ignore", module="megatron")
    return backend


def first_of_stages(layout: Layout) -> list[int]:
    """One rank of each pipeline stage.

    Its peers in tensor, expert and data parallelism hold tensors of the same shapes: sizes are
    divided evenly (legality sees to that), and rows are routed evenly.
    """
    return [layout.stage_ranks(stage)[0] for stage in range(layout.pipeline)]


def enough_microbatches(layout: Layout) -> int:
    """Micro-batches after which a step repeats itself on every rank, and its peak with it.

    1F1B is steady once the first stage holds P of them and went back by one; the spanning
    schedule once it holds 2 P - 1; interleaving takes them in groups of P.
    """
    if layout.pipeline == 1:
        return 2
    several = layout.span or layout.virtual_pipeline > 1
    return 2 * layout.pipeline if several else layout.pipeline + 1
