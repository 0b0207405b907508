"""The rules a layout must keep, each with its legal values.

They are those of Megatron-Core 0.19: ``parallel_state`` for world sizes,
``TransformerConfig.__post_init__`` for shapes and options, the interleaved schedule
for micro-batches. Each is checked here so that a run is refused before launch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from moe_train.config.root import Config
from moe_train.errors import ConfigError
from moe_train.features.balancing import CAPACITY, RANDOM
from moe_train.features.dispatchers import DISPATCHERS, SPAN
from moe_train.features.schedules import SCHEDULES, schedule_of
from moe_train.parallel.layout import Layout, divisors
from moe_train.parallel.parameters import padded_vocab
from moe_train.parallel.stages import stages_faults


def layout_faults(config: Config, layout: Layout) -> Iterator[ConfigError]:
    """Violated rules of one layout, cheapest and most fundamental first."""
    world_faults = list(_world(layout))
    yield from world_faults
    yield from _model_shapes(config, layout)
    yield from _pipeline(config, layout)
    yield from _sequence(config, layout)
    yield from _options(config, layout)
    if not any(fault.field == WORLD_SIZE for fault in world_faults):
        # Data-parallel size has no meaning while the world does not divide.
        yield from _batch(config, layout)


def per_rank_options(config: Config, layout: Layout) -> dict[str, str]:
    """Options that Megatron computes per rank and that give another curve in this layout.

    All others give the curve of a single process in every layout (docs/parity.md).

    Returns:
        A warning by option; empty where the layout is equal to a single process in all of them.
    """
    router = config.model.router
    dimensions = {
        "parallel.tensor": layout.tensor,
        "parallel.context": layout.context,
        "data parallelism": layout.data,
    }
    options = {
        "model.router.capacity_factor": CAPACITY if router.capacity_factor is not None else None,
        "model.router.force_balance": RANDOM if router.force_balance else None,
        **{f"model.router.balancing={m.name}": m.per_rank for m in router.balancing_methods},
    }
    warnings = {}
    for option, counted in options.items():
        over = counted.dimensions if counted else ()
        if counted and (split := [name for name in over if dimensions[name] > 1]):
            warnings[option] = (
                f"{option}: {counted.reason} (Megatron-Core), so the curve depends on "
                f"{', '.join(split)}"
            )
    return warnings


WORLD_SIZE = "world size"
"""Field of faults that another layout, rather than another value, would mend."""


def _world(layout: Layout) -> Iterator[ConfigError]:
    dense = layout.tensor * layout.context * layout.pipeline
    needed, problems = dense, []
    if layout.world % dense:
        problems.append(
            f"TP x CP x PP = {layout.tensor} x {layout.context} x {layout.pipeline} = {dense}"
        )
    if not layout.span:
        expert = layout.expert_tensor * layout.expert * layout.pipeline
        needed = math.lcm(dense, expert)
        if layout.world % expert:
            problems.append(
                f"ETP x EP x PP = {layout.expert_tensor} x {layout.expert} x {layout.pipeline} = "
                f"{expert} (experts live inside one pipeline stage)"
            )
    if problems:
        yield ConfigError(
            WORLD_SIZE,
            f"{layout.world} ranks are not a multiple of " + ", nor of ".join(problems),
            f"start a multiple of {needed} ranks, or change these sizes",
        )
    if layout.span:
        yield from _span_layout(layout)


def _span_layout(layout: Layout) -> Iterator[ConfigError]:
    replica = layout.tensor * layout.pipeline
    if layout.expert != replica:
        yield ConfigError(
            "parallel.expert",
            f"{layout.expert}: under placement=span the expert group is TP x PP = {replica}",
            f"parallel.expert={replica}",
        )
    if layout.expert_tensor != 1:
        yield ConfigError(
            "parallel.expert_tensor", "span keeps experts whole", "parallel.expert_tensor=1"
        )
    if layout.virtual_pipeline != 1:
        yield ConfigError(
            "parallel.virtual_pipeline",
            "span has a schedule of its own",
            "parallel.virtual_pipeline=1",
        )
    if layout.context != 1:
        yield ConfigError("parallel.context", "span keeps sequences whole", "parallel.context=1")
    if layout.stages:
        yield ConfigError("parallel.stages", "span deals layers evenly", "parallel.stages=''")


def _indivisible(
    field: str, size: int, what: str, number: int, legal: list[int] | None = None
) -> ConfigError:
    values = [d for d in divisors(number) if legal is None or d in legal]
    values = sorted(sorted(values, key=lambda d: (abs(d - size), d))[:8])
    return ConfigError(field, f"{size} does not divide {what}={number}", f"legal: {values}")


def _model_shapes(config: Config, layout: Layout) -> Iterator[ConfigError]:
    model, tensor = config.model, layout.tensor
    # Another EP than TP x PP is refused by the rules of span.
    dealt = layout.tensor * layout.pipeline if layout.span else layout.expert
    if model.experts % dealt:
        yield _experts(layout, model.experts, dealt)
    if model.heads % tensor:
        # Other divisors of TP follow heads: their faults would only repeat this one.
        yield _indivisible("parallel.tensor", tensor, "model.heads", model.heads)
        return
    kv_heads = model.num_query_groups
    if kv_heads % tensor and tensor % kv_heads:
        yield ConfigError(
            "parallel.tensor",
            f"{tensor} is neither divisor nor multiple of model.kv_heads={kv_heads}",
            f"legal: {divisors(kv_heads)} or multiples of {kv_heads}",
        )
    rows = model.query_width + 2 * model.kv_width
    if kv_heads < tensor and tensor % kv_heads == 0 and rows % tensor:
        # Megatron splits the rows of Q, K and V together where ranks share a key/value head.
        yield ConfigError(
            "parallel.tensor",
            f"{tensor} does not divide the {rows} rows of Q, K and V, as it must with fewer "
            f"than {tensor} model.kv_heads",
            f"legal: {divisors(kv_heads)}, or another model.head_dim",
        )
    # A known vocabulary may fit by its own size; an unknown one is safe by the multiple alone.
    padded = model.vocab_multiple
    if model.vocab is not None:
        padded = padded_vocab(model.vocab, model.vocab_multiple)
    if padded % tensor:
        yield ConfigError(
            "model.vocab_multiple",
            f"{padded} rows are not a multiple of parallel.tensor={tensor}",
            f"model.vocab_multiple={math.lcm(model.vocab_multiple, tensor)}",
        )
    if model.expert_hidden % layout.expert_tensor:
        yield _indivisible(
            "parallel.expert_tensor",
            layout.expert_tensor,
            "model.expert_hidden",
            model.expert_hidden,
        )
    if model.dense_hidden % tensor:
        yield _indivisible("parallel.tensor", tensor, "model.dense_hidden", model.dense_hidden)
    if layout.span and (model.dense_layers or model.mtp_layers):
        yield ConfigError(
            "parallel.placement",
            "span needs the same experts in all layers: no model.dense_layers or mtp_layers",
            "parallel.placement=stage",
        )
    if model.shared_expert_hidden % tensor:
        yield _indivisible(
            "parallel.tensor", tensor, "model.shared_expert_hidden", model.shared_expert_hidden
        )


def _experts(layout: Layout, experts: int, dealt: int) -> ConfigError:
    if not layout.span:
        return _indivisible("parallel.expert", dealt, "model.experts", experts)
    # Another size alone would only meet span's own rule.
    low = experts // dealt * dealt
    legal = [number for number in (low, low + dealt) if number]
    return ConfigError(
        "model.experts",
        f"{experts} are not a multiple of TP x PP = {dealt}, over whose ranks "
        "placement=span deals them",
        f"nearest: {legal}, or parallel.placement=stage with parallel.expert a divisor of "
        f"{experts}, or other parallel.tensor and parallel.pipeline",
    )


def _pipeline(config: Config, layout: Layout) -> Iterator[ConfigError]:
    stages, chunks, layers = layout.pipeline, layout.virtual_pipeline, config.model.layers
    if dealt := config.parallel.stages:
        yield from stages_faults(dealt, config.model, stages * chunks)
    elif layers % stages:
        yield _indivisible("parallel.pipeline", stages, "model.layers", layers)
    elif chunks > 1 and stages == 1:
        yield ConfigError(
            "parallel.virtual_pipeline",
            f"{chunks} chunks need more than one stage",
            "parallel.pipeline=2 or more, or parallel.virtual_pipeline=1",
        )
    elif layers % (stages * chunks):
        yield ConfigError(
            "parallel.virtual_pipeline",
            f"{chunks} does not divide the {layers // stages} layers of a stage",
            f"legal: {divisors(layers // stages)}",
        )
    name = config.parallel.schedule
    # No schedule runs model chunks with span, which is the layout's own error.
    if name != "auto" and not (schedule := SCHEDULES[name]).fits(chunks=chunks, span=layout.span):
        yield ConfigError(
            "parallel.schedule",
            f"{name} does not go with virtual_pipeline={chunks} and placement={layout.placement}",
            f"{schedule.needs}, or parallel.schedule=auto",
        )


def _sequence(config: Config, layout: Layout) -> Iterator[ConfigError]:
    sequence = config.data.sequence
    # Load-balanced causal attention gives each context rank two chunks of a sequence;
    # MoE with TP > 1 requires sequence parallelism, which splits what is left by TP.
    unit = layout.tensor * (2 * layout.context if layout.context > 1 else 1)
    if sequence % unit and config.model.heads % layout.tensor == 0:
        parts = "parallel.tensor" + (" x 2 x parallel.context" if layout.context > 1 else "")
        legal = sorted({max(sequence // unit, 1) * unit, (sequence // unit + 1) * unit})
        yield ConfigError(
            "data.sequence",
            f"{sequence} is not a multiple of {parts} = {unit}",
            f"nearest: {legal}",
        )


def _options(config: Config, layout: Layout) -> Iterator[ConfigError]:
    parallel, optim, router = config.parallel, config.optim, config.model.router
    name, dispatcher = parallel.dispatcher, DISPATCHERS[parallel.dispatcher]
    if not dispatcher.single and layout.expert_tensor * layout.expert == 1:
        yield ConfigError(
            "parallel.dispatcher", f"{name} needs ETP x EP > 1", "parallel.dispatcher=alltoall"
        )
    if not dispatcher.pads and router.pad_to_capacity:
        yield ConfigError(
            "model.router.pad_to_capacity",
            f"parallel.dispatcher={name} does not pad",
            "parallel.dispatcher=alltoall",
        )
    if parallel.overlap_param_gather and not (optim.distributed and parallel.overlap_grad_reduce):
        yield ConfigError(
            "parallel.overlap_param_gather",
            "needs the distributed optimizer and overlapped gradient reduction",
            "optim.distributed=true parallel.overlap_grad_reduce=true",
        )
    if config.megatron.optimizer.get("store_param_remainders"):
        yield ConfigError(
            "megatron.optimizer.store_param_remainders",
            "keeps the lower half of each master weight, while checkpoints hold whole ones",
            "megatron.optimizer.store_param_remainders=false (12 bytes a parameter, not 10)",
        )
    if parallel.overlap_expert_comm and not layout.span:
        yield from _overlap(config, layout)
    if layout.span:
        yield from _span_options(config)
    elif config.recompute.modules and config.recompute.layers != "none":
        yield ConfigError(
            "recompute.modules",
            "whole layers and single modules cannot both be recomputed",
            "recompute.layers=none or recompute.modules=[]",
        )


def _span_options(config: Config) -> Iterator[ConfigError]:
    """What the spanning exchange does not do, because it replaces Megatron's dispatcher."""
    if config.parallel.dispatcher != SPAN.megatron:
        yield ConfigError(
            "parallel.dispatcher",
            f"{config.parallel.dispatcher}: span exchanges tokens by all-to-all",
            "parallel.dispatcher=alltoall",
        )
    if config.dtype == "fp8":
        yield ConfigError(
            "dtype",
            "fp8: a rank whose own stage is idle runs experts for the others outside Megatron's "
            "fp8 context, so that with placement=span their precision would follow the schedule",
            "dtype=bf16, or parallel.placement=stage",
        )
    refused = sorted(set(config.recompute.modules) - {"moe", "moe_act"})
    if refused:
        yield ConfigError(
            "recompute.modules",
            f"{', '.join(refused)}: with span only the experts are recomputed by module",
            "recompute.modules from moe, moe_act; recompute.layers for dense parts",
        )
    for name in ("moe_shared_expert_overlap", "moe_latent_size"):
        if config.megatron.transformer.get(name):
            yield ConfigError(
                f"megatron.transformer.{name}",
                "belongs to Megatron's own dispatchers and schedules",
                "parallel.placement=stage",
            )


def _overlap(config: Config, layout: Layout) -> Iterator[ConfigError]:
    """Conditions of Megatron's combined 1F1B."""
    field = "parallel.overlap_expert_comm"
    if layout.expert == 1:
        yield ConfigError(
            field, "there is no expert communication with EP=1", "parallel.expert=2 or more"
        )
    if schedule_of(config.parallel.schedule, chunks=layout.virtual_pipeline, span=False).run:
        yield ConfigError(field, "needs a schedule of Megatron's", "parallel.schedule=auto")
    if config.dtype == "fp32":
        yield ConfigError(field, "needs 16-bit compute, not fp32", "dtype=bf16")
    if layout.pipeline > 1 and layout.virtual_pipeline == 1:
        yield ConfigError(
            field, "needs an interleaved pipeline", "parallel.virtual_pipeline=2 or more"
        )
    if config.recomputed_layers:
        yield ConfigError(field, "forbids recomputing whole layers", "recompute.layers=none")
    if "moe" in config.recompute.modules:
        yield ConfigError(field, "forbids recomputing moe", "drop moe from recompute.modules")
    if not DISPATCHERS[config.parallel.dispatcher].overlaps:
        yield ConfigError(field, "needs all-to-all dispatch", "parallel.dispatcher=alltoall")


def _batch(config: Config, layout: Layout) -> Iterator[ConfigError]:
    batch, data = config.batch, layout.data
    unit = batch.micro * data
    if batch.global_ is not None and batch.global_ % unit:
        low = batch.global_ // unit * unit
        legal = [value for value in (low, low + unit) if value]
        yield ConfigError(
            "batch.global",
            f"{batch.global_} sequences are not a multiple of batch.micro x data-parallel "
            f"size = {batch.micro} x {data}",
            f"nearest: {legal}",
        )
        return
    count = config.batch.per_step(data)
    if layout.virtual_pipeline > 1 and layout.pipeline > 1 and count % layout.pipeline:
        up = -(-count // layout.pipeline) * layout.pipeline
        fix = f"make batch.microbatches x batch.accumulation {up}"
        if batch.global_ is not None:
            fix = f"batch.global={up * unit}"
        yield ConfigError(
            "batch.global" if batch.global_ is not None else "batch.microbatches",
            f"{count} micro-batches a step are not a multiple of the {layout.pipeline} stages "
            "that interleaved 1F1B deals them to",
            fix,
        )
