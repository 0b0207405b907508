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
    dense_layers: NonNegativeInteger = 0
    """First layers with a dense SwiGLU in place of router and experts. Planned only."""
    dense_hidden: Annotated[NonNegativeInteger, Field(le=2**24)] = 0
    """Inner width of the SwiGLU of dense layers."""
    mtp_layers: Annotated[NonNegativeInteger, Field(le=16)] = 0
    """Multi-token-prediction layers behind the last one (DeepSeek-V3). Planned only."""
    kv_lora_rank: Width | None = None
    """Latent width of keys and values: multi-latent attention (DeepSeek-V2); null is grouped-query
    attention. Planned only."""
    q_lora_rank: Width | None = None
    """Latent width of queries with kv_lora_rank; null projects them from the hidden state."""
    qk_nope_head_dim: Width = 128
    """Width of a query or key head that is not rotated, with kv_lora_rank."""
    qk_rope_head_dim: Width = 64
    """Width of a query head, and of the one key, that is rotated, with kv_lora_rank."""
    v_head_dim: Width = 128
    """Width of a value head with kv_lora_rank."""
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
    def latent(self) -> bool:
        """Whether attention is multi-latent."""
        return self.kv_lora_rank is not None

    @property
    def kv_channels(self) -> int:
        """Width of an attention head, by Megatron's name for it; the rotated part of a latent
        one.
        """
        if self.latent:
            return self.qk_rope_head_dim
        return self.head_dim or self.hidden // self.heads

    @property
    def num_query_groups(self) -> int:
        """Key/value heads, by Megatron's name for them."""
        return self.heads if self.latent else self.kv_heads or self.heads

    @property
    def query_width(self) -> int:
        """Columns of Q, all heads."""
        each = self.qk_nope_head_dim + self.qk_rope_head_dim if self.latent else self.kv_channels
        return self.heads * each

    @property
    def output_width(self) -> int:
        """Columns that attention hands to its output projection, all heads."""
        return self.heads * self.v_head_dim if self.latent else self.query_width

    @property
    def kv_width(self) -> int:
        """Columns of K, and of V; their mean, where latent attention's differ."""
        if self.latent:
            return (self.query_width + self.output_width) // 2
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

    @property
    def latent_width(self) -> int:
        """Columns of multi-latent attention's down-projections; 0 without."""
        if self.kv_lora_rank is None:
            return 0
        return (self.q_lora_rank or 0) + self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def projection_weights(self) -> int:
        """Weights of a layer's attention that tensor parallelism splits: the projections, and of
        multi-latent attention those up from the latents (DeepSeek-V2, arXiv:2405.04434, section
        2.1).
        """
        out = self.output_width * self.hidden
        if self.kv_lora_rank is None:
            return self.hidden * (self.query_width + 2 * self.kv_width) + out
        up = self.kv_lora_rank * self.heads * (self.qk_nope_head_dim + self.v_head_dim)
        return (self.q_lora_rank or self.hidden) * self.query_width + up + out

    @property
    def latent_weights(self) -> int:
        """Weights of the down-projections to the latents and of their norms, whole on every rank
        (Megatron's ``linear_q_down_proj`` and ``linear_kv_down_proj``).
        """
        norms = (self.q_lora_rank or 0) + (self.kv_lora_rank or 0)
        return self.hidden * self.latent_width + norms

    @property
    def moe_layers(self) -> int:
        """Layers with experts, multi-token prediction's included."""
        return self.layers - self.dense_layers + self.mtp_layers
