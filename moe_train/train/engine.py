"""One rank's model, optimizer, LR scheduler and pipeline schedule, built once."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_train.backend import patches
from moe_train.backend.protocol import Backend
from moe_train.config.root import Config
from moe_train.features.optimizers import OPTIMIZERS
from moe_train.features.schedules import schedule_of
from moe_train.model.build import build_chunks, build_model
from moe_train.model.span.dispatcher import CrossStageDispatcher
from moe_train.model.transformer_config import optimizer_config, transformer_config
from moe_train.parallel.resolved import ResolvedRun
from moe_train.train.lr_schedule import build_scheduler
from moe_train.train.router_stats import RoutingRecorder
from moe_train.train.tracing import Tracer


@dataclass
class Engine:
    """What a training step needs on one rank. Only model and optimizer have mutable state."""

    run: ResolvedRun
    backend: Backend
    groups: ProcessGroupCollection
    megatron: TransformerConfig
    chunks: list[Any]
    """The model, in Megatron's DistributedDataParallel where it trains."""
    optimizer: Any
    """None without training, like `scheduler`."""
    scheduler: OptimizerParamScheduler | None
    forward_backward: Callable[..., Any]
    routing: RoutingRecorder
    tracer: Tracer

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.run.config

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return bool(self.groups.pp.rank() == self.groups.pp.size() - 1)

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's loss is the one of its replica that is counted."""
        return self.is_last_stage and self.groups.tp.rank() == 0 and self.groups.cp.rank() == 0


def build_engine(
    run: ResolvedRun,
    backend: Backend,
    groups: ProcessGroupCollection,
    *,
    trains: bool = True,
    sequence_parallel: bool = True,
) -> Engine:
    """Build model, optimizer and schedule of this rank.

    Args:
        trains: False builds the model alone, without gradients, optimizer and initial values: its
            weights have to be loaded.
        sequence_parallel: False keeps whole sequences on tensor-parallel ranks, for passes of a
            single token.
    """
    config = run.config
    seed_everything(config.run.seed)
    megatron = transformer_config(config, backend, sequence_parallel=sequence_parallel)
    cross_stage = build_dispatcher(config, megatron, backend, groups) if run.layout.span else None
    build = build_model if trains else build_chunks
    chunks = build(
        config,
        megatron,
        backend,
        groups,
        padded_vocab=run.padded_vocab,
        recomputed=config.recomputed_layers,
        cross_stage=cross_stage,
    )
    optimizer: Any = None
    scheduler: OptimizerParamScheduler | None = None
    if trains:
        optimizer, scheduler = _optimizer(config, backend, chunks)
    else:
        chunks = [chunk.to(backend.device).eval() for chunk in chunks]
    schedule = schedule_of(
        config.parallel.schedule, chunks=run.layout.virtual_pipeline, span=run.layout.span
    )
    tracer = Tracer(groups.pp.rank(), backend.synchronize)
    if config.train.trace:
        tracer.set_groups(groups)
    if trains:
        _connect(megatron, config, chunks, optimizer, tracer)
    return Engine(
        run=run,
        backend=backend,
        groups=groups,
        megatron=megatron,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        forward_backward=(
            pkgutil.resolve_name(schedule.run)(cross_stage, groups, tracer.region)
            if schedule.run
            else get_forward_backward_func()
        ),
        routing=RoutingRecorder(chunks, config.model.layers, config.model.experts, backend.device),
        tracer=tracer,
    )


def _optimizer(
    config: Config, backend: Backend, chunks: list[Any]
) -> tuple[Any, OptimizerParamScheduler]:
    # Weight decay by parameter is Megatron's default (get_standard_config_overrides): parameters of
    # one dimension (norms) and biases have none.
    with patches.optimizer_built_by(OPTIMIZERS[config.optim.name], config.optim):
        optimizer = get_megatron_optimizer(
            optimizer_config(config, backend),
            chunks,
            use_gloo_process_groups=False,
            pg_collection=None,
        )
    return optimizer, build_scheduler(optimizer, config.optim, config.train.steps)


def build_dispatcher(
    config: Config, megatron: TransformerConfig, backend: Backend, groups: ProcessGroupCollection
) -> CrossStageDispatcher:
    """Token dispatcher of ``placement=span``, over all ranks of this replica."""
    assert megatron.pipeline_dtype is not None
    return CrossStageDispatcher(
        groups.mp,
        tensor=megatron.tensor_model_parallel_size,
        stages=megatron.pipeline_model_parallel_size,
        hidden=megatron.hidden_size,
        dtype=megatron.pipeline_dtype,
        device=backend.device,
        recompute="moe" in config.recompute.modules,
        overlap=config.parallel.overlap_expert_comm,
    )


def release(engine: Engine) -> None:
    """Let the model's memory go with its last reference, when a run in this process ends.

    Megatron keeps nodes of autograd's graph in two places: the accumulators of its
    DistributedDataParallel, whose hooks hold the model, and a dispatcher's probabilities. Such a
    cycle runs through C++, where Python's collector does not see it, so that every job of a sweep
    would keep its model on the device.
    """
    for chunk in engine.chunks:
        if isinstance(chunk, DistributedDataParallel):
            chunk.grad_accs.clear()
        for module in chunk.modules():
            dispatcher = getattr(module, "token_dispatcher", None)
            for name, value in list(vars(dispatcher).items()) if dispatcher else ():
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    setattr(dispatcher, name, None)


def seed_everything(seed: int) -> None:
    """Seed torch and Megatron's tracker of tensor-parallel and expert states."""
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _connect(
    megatron: TransformerConfig,
    config: Config,
    chunks: list[DistributedDataParallel],
    optimizer: Any,
    tracer: Tracer,
) -> None:
    """Give the schedules their hooks into DDP and the optimizer (as Megatron's training does).

    ``grad_scale_func`` scales the loss; Megatron's schedules divide it and the auxiliary losses by
    the number of micro-batches (``forward_step_calc_loss``). ``finalize_model_grads`` ends a
    schedule: gradients are averaged over replicas, those of norms under sequence parallelism summed
    over tensor-parallel ranks, those of tied embeddings over the first and the last stage; then it
    updates the expert bias.
    """
    megatron.finalize_model_grads_func = tracer.around(
        "gradients", "gradients", finalize_model_grads
    )
    megatron.grad_scale_func = optimizer.scale_loss
    if chunks[0].ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        starts = [chunk.start_grad_sync for chunk in chunks]
        single = len(chunks) == 1
        megatron.no_sync_func = no_sync[0] if single else no_sync
        if config.megatron.ddp.get("align_grad_reduce", True) and not single:
            megatron.grad_sync_func = starts
    if config.parallel.overlap_param_gather and len(chunks) > 1:
        megatron.param_sync_func = [partial(chunk.start_param_sync) for chunk in chunks]
