"""Config groups of the model: the transformer and its router."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from moe_train.config.types import (
    BalancingName,
    Bool,
    Count,
    NonNegativeInteger,
    NonNegativeNumber,
    PositiveInteger,
    PositiveNumber,
    Text,
    Tokens,
    Width,
)
from moe_train.features.balancing import Balancing, methods


@dataclass(frozen=True)
class RouterConfig:
    """Top-k routing of tokens to experts (Megatron's ``TopKRouter``)."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score function over expert logits."""
    balancing: BalancingName = "aux"
    """Load-balancing loss or routing method."""
    aux_coeff: NonNegativeNumber = 1e-2
    """Weight of the auxiliary load-balancing loss (unused by sinkhorn and none)."""
    z_coeff: NonNegativeNumber = 0.0
    """Weight of the router z-loss (ST-MoE, arXiv:2202.08906); 0 switches it off."""
    expert_bias: Bool = False
    """Auxiliary-loss-free balancing bias (arXiv:2408.15664); needs score=sigmoid."""
    expert_bias_rate: NonNegativeNumber = 1e-3
    """Update rate of the expert bias per optimizer step."""
    capacity_factor: PositiveNumber | None = None
    """Tokens that an expert accepts, as a multiple of its even share; null never drops."""
    drop_policy: Literal["probs", "position"] = "probs"
    """Tokens dropped beyond the capacity: the least probable (probs) or the last (position)."""
    pad_to_capacity: Bool = False
    """Pad every expert to its capacity: static shapes, for graphs and dry runs."""
    groups: PositiveInteger | None = None
    """Expert groups for group-limited routing (DeepSeek-V2/V3); null is off."""
    groups_per_token: PositiveInteger | None = None
    """Groups that a token may be routed to."""
    pre_softmax: Bool = False
    """Softmax over all experts before the top-k, instead of over the chosen k."""
    scaling_factor: PositiveNumber | None = None
    """Factor on the chosen probabilities (DeepSeek-V3); null is 1."""
    force_balance: Bool = False
    """Random, even routing for benchmarks; such runs are labelled in their metrics."""

    @property
    def balancing_methods(self) -> list[Balancing]:
        """Descriptors of the methods in effect; a loss without weight is not."""
        return [*methods(self.balancing, aux_coeff=self.aux_coeff, expert_bias=self.expert_bias)]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with a Mixture-of-Experts layer in every block."""

    name: Text = "custom"
    """Label used in reports and in the default run name."""
    layers: Annotated[PositiveInteger, Field(le=1024)] = 16
    """Transformer layers."""
    hidden: Width = 64
    """Width of the residual stream."""
    heads: Count = 16
    """Attention (query) heads."""
    kv_heads: PositiveInteger | None = None
    """Key/value heads (grouped-query attention); null is one per query head."""
    head_dim: Width | None = None
    """Width of a head; null is hidden / heads."""
    experts: Count = 64
    """Routed experts per layer."""
    experts_per_token: PositiveInteger = 2
    """Experts that a token is routed to (top-k)."""
    expert_hidden: Width = 32
    """Inner width of a SwiGLU expert."""
    shared_expert_hidden: Annotated[NonNegativeInteger, Field(le=2**24)] = 0
    """Inner width of the always-active shared expert; 0 is none."""
    vocab: Tokens | None = None
    """Vocabulary size; null is the tokenizer's. Rows are padded as in Megatron."""
    vocab_multiple: Tokens = 128
    """The vocabulary is padded to a multiple of this, the same for every layout."""
    tied_embeddings: Bool = False
    """Share the input embedding with the output head."""
    norm_epsilon: PositiveNumber = 1e-5
    """Epsilon of RMSNorm."""
    rope_base: PositiveNumber = 10000.0
    """Base of the rotary position embedding."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys before the rotary embedding: none, over each head (Qwen3), or
    over all heads together (OLMoE, reduced over tensor-parallel ranks)."""
    init_std: PositiveNumber = 0.02
    """Standard deviation of the initial weights."""
    router: RouterConfig = field(default_factory=RouterConfig)

    @property
    def kv_channels(self) -> int:
        """Width of an attention head, by Megatron's name for it."""
        return self.head_dim or self.hidden // self.heads

    @property
    def num_query_groups(self) -> int:
        """Key/value heads, by Megatron's name for them."""
        return self.kv_heads or self.heads

    @property
    def query_width(self) -> int:
        """Columns of Q, all heads."""
        return self.heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """Columns of K, and of V."""
        return self.num_query_groups * self.kv_channels

    @property
    def qk_norm_widths(self) -> tuple[int, int]:
        """Weights of the norms of a layer's queries and of its keys; they are on every rank."""
        widths = {
            "none": (0, 0),
            "head": (self.kv_channels, self.kv_channels),
            "full": (self.query_width, self.kv_width),
        }
        return widths[self.qk_norm]
