"""Exact parameter counts: in total, active for a token, and on each rank.

Three divisors make MoE counts differ from dense ones: matrices of the dense parts
are split by TP, norms and router by nothing, experts by ETP x EP. Embedding and head
live on the end stages and have the padded vocabulary's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.model import ModelConfig
from moe_train.parallel.layout import Layout


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one transformer layer, unsplit."""

    attention: int
    """QKV and output projections, split by TP."""
    shared_expert: int
    """The always-active expert, split by TP."""
    replicated: int
    """Norms and the router, whole on every rank."""
    one_expert: int
    """A single routed SwiGLU expert, split by ETP."""


@dataclass(frozen=True)
class RankParameters:
    """Parameters held by one rank."""

    embedding: int
    attention: int
    shared_expert: int
    replicated: int
    """Norms, routers and, on the last stage, the final norm."""
    experts: int
    head: int
    expert_modules: int
    """(layer, expert) pairs hosted, whole or as an ETP shard."""

    @property
    def dense(self) -> int:
        """All parameters but the routed experts."""
        return self.embedding + self.attention + self.shared_expert + self.replicated + self.head

    @property
    def total(self) -> int:
        """All parameters of the rank."""
        return self.dense + self.experts


@dataclass(frozen=True)
class ModelParameters:
    """Parameters of the whole model, each counted once."""

    embedding: int
    head: int
    attention: int
    shared_expert: int
    replicated: int
    experts: int
    active: int
    """Parameters a token passes, embedding and head included."""

    @property
    def total(self) -> int:
        """All parameters of the model."""
        parts = (self.embedding, self.head, self.attention, self.shared_expert)
        return sum(parts) + self.replicated + self.experts


def padded_vocab(vocab: int, multiple: int) -> int:
    """Rows of embedding and head for `vocab` tokens."""
    return -(-vocab // multiple) * multiple


def layer_parameters(model: ModelConfig) -> LayerParameters:
    """Unsplit parameter counts of one layer."""
    swiglu = 3 * model.hidden
    return LayerParameters(
        attention=model.hidden * 2 * (model.query_width + model.kv_width),
        shared_expert=swiglu * model.shared_expert_hidden,
        replicated=(2 + model.experts) * model.hidden + sum(model.qk_norm_widths),
        one_expert=swiglu * model.expert_hidden,
    )


def model_parameters(model: ModelConfig, vocab: int) -> ModelParameters:
    """Counts of the whole model for a vocabulary of `vocab` tokens (unpadded)."""
    layer = layer_parameters(model)
    rows = padded_vocab(vocab, model.vocab_multiple) * model.hidden
    head = 0 if model.tied_embeddings else rows
    dense = layer.attention + layer.shared_expert + layer.replicated
    return ModelParameters(
        embedding=rows,
        head=head,
        attention=model.layers * layer.attention,
        shared_expert=model.layers * layer.shared_expert,
        replicated=model.layers * layer.replicated + model.hidden,
        experts=model.layers * model.experts * layer.one_expert,
        active=model.layers * (dense + model.experts_per_token * layer.one_expert)
        + model.hidden
        + rows
        + head,
    )


def rank_parameters(model: ModelConfig, layout: Layout, rank: int, vocab: int) -> RankParameters:
    """Counts of the tensors that exist on `rank`.

    With tied embeddings and more than one stage the last stage keeps a copy of the
    embedding for the head, so the ranks then sum to more than the model.
    """
    layer = layer_parameters(model)
    stage = layout.coordinates(rank).dense.pp
    layers = len(layout.stage_layers(stage))
    first, last = stage == 0, stage == layout.pipeline - 1
    rows = padded_vocab(vocab, model.vocab_multiple) // layout.tensor * model.hidden
    own_head = last and not (model.tied_embeddings and first)
    modules = len(layout.expert_layers(rank)) * len(layout.local_experts(rank))
    return RankParameters(
        embedding=rows if first else 0,
        attention=layers * layer.attention // layout.tensor,
        shared_expert=layers * layer.shared_expert // layout.tensor,
        replicated=layers * layer.replicated + (model.hidden if last else 0),
        experts=modules * layer.one_expert // layout.expert_tensor,
        head=rows if own_head else 0,
        expert_modules=modules,
    )
