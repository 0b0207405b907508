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
    """The always-active expert, split by TP; none in a dense layer."""
    feed_forward: int
    """SwiGLU of a dense layer, split by TP."""
    replicated: int
    """Norms and multi-latent attention's down-projections, whole on every rank."""
    router: int
    """Whole on every rank; none in a dense layer."""
    one_expert: int
    """A single routed SwiGLU expert, split by ETP."""


@dataclass(frozen=True)
class RankParameters:
    """Parameters held by one rank."""

    embedding: int
    attention: int
    shared_expert: int
    feed_forward: int
    """SwiGLU of dense layers, and what multi-token prediction projects with."""
    replicated: int
    """Norms, routers and, on the last stage, the final norm."""
    experts: int
    head: int
    expert_modules: int
    """(layer, expert) pairs hosted, whole or as an ETP shard."""

    @property
    def dense(self) -> int:
        """All parameters but the routed experts."""
        parts = (self.embedding, self.attention, self.shared_expert, self.feed_forward)
        return sum(parts) + self.replicated + self.head

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
    feed_forward: int
    """SwiGLU of dense layers, and what multi-token prediction projects with."""
    replicated: int
    experts: int
    active: int
    """Parameters a token passes, embedding and head included; without multi-token prediction."""

    @property
    def total(self) -> int:
        """All parameters of the model."""
        parts = (self.embedding, self.head, self.attention, self.shared_expert)
        return sum(parts) + self.feed_forward + self.replicated + self.experts


def padded_vocab(vocab: int, multiple: int) -> int:
    """Rows of embedding and head for `vocab` tokens."""
    return -(-vocab // multiple) * multiple


def layer_parameters(model: ModelConfig) -> LayerParameters:
    """Unsplit parameter counts of one layer: with experts, or dense."""
    swiglu = 3 * model.hidden
    return LayerParameters(
        attention=model.projection_weights,
        shared_expert=swiglu * model.shared_expert_hidden,
        feed_forward=swiglu * model.dense_hidden,
        replicated=2 * model.hidden + model.latent_weights + sum(model.qk_norm_widths),
        router=model.experts * model.hidden,
        one_expert=swiglu * model.expert_hidden,
    )


def mtp_parameters(model: ModelConfig) -> tuple[int, int]:
    """What a multi-token-prediction layer has beside its transformer layer: the projection of state
    and embedding together, split by TP, and its norms (DeepSeek-V3, arXiv:2412.19437, section 2.2;
    three norms in Megatron-Core 0.19). Embedding and head are the model's own.
    """
    return 2 * model.hidden**2, 3 * model.hidden


def model_parameters(model: ModelConfig, vocab: int) -> ModelParameters:
    """Counts of the whole model for a vocabulary of `vocab` tokens (unpadded)."""
    layer = layer_parameters(model)
    rows = padded_vocab(vocab, model.vocab_multiple) * model.hidden
    head = 0 if model.tied_embeddings else rows
    layers, dense, predicted = model.layers, model.dense_layers, model.mtp_layers
    joined, norms = mtp_parameters(model)
    chosen = layer.shared_expert + layer.router + model.experts_per_token * layer.one_expert
    return ModelParameters(
        embedding=rows,
        head=head,
        attention=(layers + predicted) * layer.attention,
        shared_expert=model.moe_layers * layer.shared_expert,
        feed_forward=dense * layer.feed_forward + predicted * joined,
        replicated=(layers + predicted) * layer.replicated
        + model.moe_layers * layer.router
        + predicted * norms
        + model.hidden,
        experts=model.moe_layers * model.experts * layer.one_expert,
        active=layers * (layer.attention + layer.replicated)
        + dense * layer.feed_forward
        + (layers - dense) * chosen
        + model.hidden
        + rows
        + head,
    )


def rank_parameters(model: ModelConfig, layout: Layout, rank: int, vocab: int) -> RankParameters:
    """Counts of the tensors that exist on `rank`.

    With tied embeddings and more than one stage the last stage keeps a copy of the
    embedding for the head, so the ranks then sum to more than the model. A stage that predicts
    further tokens keeps one for them in the same way (Megatron-Core 0.19).
    """
    layer = layer_parameters(model)
    stage = layout.coordinates(rank).dense.pp
    numbers = layout.stage_layers(stage)
    layers = len(numbers)
    moe = sum(number > model.dense_layers for number in numbers)
    predicted = sum(number > model.layers for number in numbers)
    joined, norms = mtp_parameters(model)
    first, last = stage == 0, stage == layout.pipeline - 1
    rows = padded_vocab(vocab, model.vocab_multiple) // layout.tensor * model.hidden
    own_head = last and not (model.tied_embeddings and first)
    hosted = sum(number > model.dense_layers for number in layout.expert_layers(rank))
    modules = hosted * len(layout.local_experts(rank))
    feed_forward = (layers - moe) * layer.feed_forward + predicted * joined
    return RankParameters(
        embedding=rows * (first + (predicted > 0 and not first)),
        attention=layers * layer.attention // layout.tensor,
        shared_expert=moe * layer.shared_expert // layout.tensor,
        feed_forward=feed_forward // layout.tensor,
        replicated=layers * layer.replicated
        + moe * layer.router
        + predicted * norms
        + (model.hidden if last else 0),
        experts=modules * layer.one_expert // layout.expert_tensor,
        head=rows if own_head else 0,
        expert_modules=modules,
    )
