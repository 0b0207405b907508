"""Ranks of any world on fake tensors: shapes, keys and counts of a full-size model in seconds.

torch's ``fake`` process-group backend answers every collective at once and FakeTensorMode holds
no memory, so one process can be any rank of any world: the real model code runs, on sizes that
no machine here could hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_train.backend.groups import close_world, open_groups
from moe_train.config.layers import parse_layers
from moe_train.model.build import build_chunks
from moe_train.model.transformer_config import spans, transformer_config
from moe_train.plan.parameters import padded_vocab
from moe_train.train.engine import open_span

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from moe_train.backend.protocol import Backend
    from moe_train.config.root import Config
    from moe_train.plan.layout import Layout


@contextlib.contextmanager
def fake_world(rank: int, world: int) -> Iterator[FakeTensorMode]:
    """Be ``rank`` of ``world`` inside the block; tensors made there hold no memory.

    Groups opened inside are closed at the end, so one process can be one rank after the other.
    The machine's backend has to be prepared before.
    """
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    # Leaving a fork compares generator states, and fake tensors have no values to compare.
    no_fork = mock.patch.object(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
    dist.init_process_group(backend="fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with no_fork, FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        close_world()


def fake_groups(layout: Layout) -> ProcessGroupCollection:
    """Every process group of ``layout``; call inside :func:`fake_world`."""
    return open_groups(layout, timeout_seconds=60, gloo=False)


def fake_chunks(config: Config, layout: Layout, backend: Backend) -> list[GPTModel]:
    """This rank's model chunks, uninitialised; call inside :func:`fake_world`.

    Args:
        config: resolved: every parallel size filled, and ``model.vocab`` set.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    assert config.model.vocab
    groups = fake_groups(layout)
    # Seeding fills real generator states, which must not become fake.
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model_parallel_cuda_manual_seed(config.run.seed, force_reset_rng=True)
    megatron = transformer_config(config, backend)
    return build_chunks(
        config,
        megatron,
        backend,
        groups,
        padded_vocab=padded_vocab(config.model.vocab, config.model.vocab_multiple),
        recomputed=frozenset(parse_layers(config.recompute.layers, config.model.layers)),
        span=open_span(config, megatron, backend, groups) if spans(config) else None,
    )


def parameter_count(chunks: list[GPTModel]) -> int:
    """Parameters of a rank, a shared one counted once."""
    distinct: dict[int, Any] = {id(p): p for chunk in chunks for p in chunk.parameters()}
    return sum(parameter.numel() for parameter in distinct.values())
