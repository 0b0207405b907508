"""What Megatron itself says to a config: its dataclasses, process groups, modules and schedules.

One process is rank 0 and then the last rank of any world, on torch's ``fake`` process-group
backend and fake tensors. Nothing of the planner's rules is used.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from moe_train.config.root import Config
from moe_train.config.schema import from_mapping
from moe_train.errors import ConfigError
from moe_train.measure.dryrun.world import fake_engine, fake_world
from moe_train.parallel.resolved import resolved_run
from tests.support.cuda_configs import transformer_engine_answers

if TYPE_CHECKING:
    from moe_train.backend.protocol import Backend
    from moe_train.parallel.layout import Layout
    from moe_train.train.engine import Engine

REFUSALS = (
    AssertionError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    ImportError,
    TypeError,
    ConfigError,
)
"""Errors by which Megatron, torch and our thin layer over them say no."""


class Reached(Exception):
    """The schedule's checks are behind: it asks for the first forward pass."""


def refusal(config: Config, layout: Layout) -> str:
    """Why Megatron would not run a resolved config; empty if it would.

    Unless ``device=cpu``, its configs are those of the CUDA backend, checked as where
    TransformerEngine is installed; modules are the host's in both cases.
    """
    from moe_train.backend.cpu.backend import CpuBackend
    from moe_train.backend.cuda.backend import CudaBackend

    host = CpuBackend(config.backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if config.device != "cpu":
                with transformer_engine_answers():
                    _configs(config, CudaBackend(0, config.backend))
            else:
                _configs(config, host)
            microbatches = _microbatches(config, layout)
            for rank in sorted({0, layout.world - 1}):
                with fake_world(rank, layout.world), _host_modules(config):
                    _build(config, layout, host, microbatches)
        except REFUSALS as error:
            return f"{type(error).__name__}: {error}"
    return ""


def _configs(config: Config, backend: Backend) -> None:
    from moe_train.model.transformer_config import (
        ddp_config,
        optimizer_config,
        transformer_config,
    )

    transformer_config(config, backend)
    ddp_config(config)
    optimizer_config(config, backend)


def _microbatches(config: Config, layout: Layout) -> int:
    """Micro-batches of a step, by Megatron's own calculator where the global batch is set."""
    from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator

    batch = config.batch
    if batch.global_ is None or layout.data == 0:
        return batch.microbatches * batch.accumulation
    counted = ConstantNumMicroBatchesCalculator(batch.global_, batch.micro, layout.data, False, 0)
    return int(counted.get())


@contextlib.contextmanager
def _host_modules(config: Config) -> Iterator[None]:
    """Let what exists on CUDA alone be built: fp8 as bf16, DeepEP as if it were installed."""
    from megatron.core.transformer.moe import token_dispatcher

    with contextlib.ExitStack() as stack:
        if config.device != "cpu":
            if config.dtype == "fp8":
                stack.enter_context(mock.patch.object(config, "dtype", "bf16"))
            for name in ("fused_dispatch", "set_deepep_num_sms"):
                stack.enter_context(mock.patch.object(token_dispatcher, name, lambda *_: None))
        yield


def _build(config: Config, layout: Layout, backend: Backend, microbatches: int) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    from moe_train.model.build import unwrap

    assert config.model.vocab
    engine = fake_engine(resolved_run(config, layout.world), backend)
    model = unwrap(engine.chunks[0])
    # Megatron counts layers itself when it makes the layers' specs; ours come counted.
    for chunk in range(layout.virtual_pipeline):
        count = get_num_layers_to_build(
            engine.megatron, vp_stage=chunk, pp_rank=engine.groups.pp.rank()
        )
        assert count == len(model.decoder.layers), "another number of layers"
    if model.pre_process:
        _first_layer(config, layout, model)
    if layout.virtual_pipeline > 1:
        _interleaved(engine, config, microbatches)


def _first_layer(config: Config, layout: Layout, model: Any) -> None:
    """Embedding, attention, router and experts of one micro-batch, as the rank's shapes have it."""
    parts = 2 * layout.context if layout.context > 1 else 1
    length = config.data.sequence // layout.context
    tokens = torch.zeros(config.batch.micro, config.data.sequence, dtype=torch.int64)
    # Two of 2 x CP equal parts, as Megatron's get_batch_on_this_cp_rank deals them: that function
    # itself pins memory, for which it needs a GPU.
    mine = tokens.view(config.batch.micro, parts, config.data.sequence // parts)
    mine = mine[:, :2].reshape(config.batch.micro, length)
    hidden = model.embedding(input_ids=mine, position_ids=mine)
    layer = model.decoder.layers[0]
    out, _ = layer.self_attention(
        layer.input_layernorm(hidden),
        attention_mask=None,
        rotary_pos_emb=model.rotary_pos_emb(length, packed_seq=True),
    )
    assert out.shape == hidden.shape, "attention changes the shape"
    if config.model.router.balancing != "sinkhorn":
        # Sinkhorn iterates until values converge, and there are none.
        layer.mlp.router.eval()
        layer.mlp.router(hidden)
    if config.device == "cpu":
        experts = layer.mlp.experts
        rows = [8] * experts.num_local_experts
        narrow, _ = experts.linear_fc1(hidden.new_empty(sum(rows), config.model.hidden), rows)
        experts.linear_fc2(narrow.chunk(2, -1)[0], rows)


def _interleaved(engine: Engine, config: Config, microbatches: int) -> None:
    def forward_step(*_: Any, **__: Any) -> None:
        raise Reached

    """The checks with which the interleaved schedule begins."""
    try:
        engine.forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(()) for _ in engine.chunks],
            model=engine.chunks,
            num_microbatches=microbatches,
            seq_length=config.data.sequence,
            micro_batch_size=config.batch.micro,
            forward_only=False,
        )
    except Reached:
        return


def refusals(rank: int, one: int, drawn: list[tuple[dict[str, Any], int]]) -> list[str]:
    """`refusal` of many (mapping of a resolved config, world) pairs; run by `run_world`."""
    from moe_train.backend.cpu.backend import CpuBackend
    from moe_train.parallel.sizes import layout_of

    lines: list[str] = []
    for mapping, world in drawn:
        config, faults = from_mapping(Config, mapping)
        assert not faults
        if not lines:
            CpuBackend(config.backend).prepare()
        lines.append(refusal(config, layout_of(config, world)))
    return lines
