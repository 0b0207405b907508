"""Build this rank's model chunks and wrap them for data parallelism.

GPTModel is chosen here and nowhere else: it is the one Megatron model with the combined-1F1B
all-to-all overlap today, and it announces its own replacement.
"""

from __future__ import annotations

import pkgutil
from functools import partial
from typing import TYPE_CHECKING

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel

from moe_train.features.dispatchers import dispatcher
from moe_train.model.initialise import initialise
from moe_train.model.spec import block_spec
from moe_train.model.transformer_config import ddp_config

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from moe_train.backend.protocol import Backend
    from moe_train.config.root import Config
    from moe_train.model.span.dispatcher import CrossStageDispatcher


def build_chunks(
    config: Config,
    megatron: TransformerConfig,
    backend: Backend,
    groups: ProcessGroupCollection,
    *,
    padded_vocab: int,
    recomputed: frozenset[int],
    cross_stage: CrossStageDispatcher | None = None,
) -> list[GPTModel]:
    """This rank's model chunks (one, or one per virtual pipeline stage), uninitialised.

    Args:
        megatron: the TransformerConfig that every module keeps.
        padded_vocab: rows of the embedding over all tensor-parallel ranks.
        recomputed: 1-based global numbers of the layers that are recomputed whole.
        cross_stage: dispatcher of all layers with ``placement=span``.
    """
    chunks = megatron.virtual_pipeline_model_parallel_size or 1
    stages = megatron.pipeline_model_parallel_size
    layers = megatron.num_layers // stages // chunks
    stage = groups.pp.rank()
    provider = backend.spec_provider()
    layer = dispatcher(config.parallel.dispatcher, span=cross_stage is not None).layer
    extra = {} if cross_stage is None else {"dispatcher": cross_stage}
    moe_layer = partial(pkgutil.resolve_name(layer), **extra) if layer else None
    full_width = groups.tp if config.model.qk_norm == "full" else None
    spec = block_spec(provider, megatron, layers, recomputed, moe_layer, full_width)
    models = []
    for chunk in range(chunks):
        model = GPTModel(
            config=megatron,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab,
            max_sequence_length=config.data.sequence,
            pre_process=stage == 0 and chunk == 0,
            post_process=stage == stages - 1 and chunk == chunks - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=config.model.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=int(config.model.rope_base),
            pg_collection=groups,
            vp_stage=chunk if chunks > 1 else None,
        )
        backend.finish_model(model)
        models.append(model)
    return models


def build_model(
    config: Config,
    megatron: TransformerConfig,
    backend: Backend,
    groups: ProcessGroupCollection,
    *,
    padded_vocab: int,
    recomputed: frozenset[int],
    cross_stage: CrossStageDispatcher | None = None,
) -> list[DistributedDataParallel]:
    """Chunks with layout-invariant weights, each wrapped in Megatron's DDP."""
    chunks = build_chunks(
        config,
        megatron,
        backend,
        groups,
        padded_vocab=padded_vocab,
        recomputed=recomputed,
        cross_stage=cross_stage,
    )
    initialise(chunks, megatron, config.run.seed)
    ddp = ddp_config(config)
    wrapped: list[DistributedDataParallel] = []
    for index, chunk in enumerate(chunks):
        chunk.to(backend.device)
        wrapped.append(
            DistributedDataParallel(
                config=megatron,
                ddp_config=ddp,
                module=chunk,
                pg_collection=groups,
                # Later chunks finish their backward pass first; only the first one is left to
                # overlap, so the others go out in one bucket (Megatron's own rule).
                disable_bucketing=index > 0,
            )
        )
    return wrapped


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside a DDP wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model  # type: ignore[return-value]
