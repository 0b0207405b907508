"""Sizes of one micro-batch on one rank, from which memory, work and traffic follow.

Letters in formulas, here and in all modules that count bytes:

    S sequence, B sequences of a micro-batch, t TP, c CP, p PP, e EP, x ETP
    T = S / c         positions of a sequence on a context rank
    N = S B / (t c)   tokens of the residual stream on a rank (sequence parallel)
    A = S B / c       tokens that attention and head see, gathered over TP
    K                 experts a token is sent to; N K routed rows leave a rank
    R                 rows that a rank's experts receive, on average N K x, times imbalance
    H hidden, Q query and G key/value width on a rank, D rotated head width, n heads on a rank
    U width that attention hands to its output projection on a rank, Q without latents
    P weights of attention's projections that a rank holds its share of, H (Q + 2 G) + U H
    C columns of multi-latent attention's down-projections, whole on every rank; 0 without
    E experts of a layer, F expert width on a rank (f / x), W shared width on a rank
    V vocabulary rows on a rank, b bytes of the compute dtype
    s bytes in which a matrix product saves its input: 1 in fp8, else b
    w bytes of a row packed for the spanning exchange
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_train.config.root import Config
from moe_train.parallel.layout import Layout
from moe_train.parallel.parameters import padded_vocab

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
"""Bytes of a weight or activation; fp8 runs have both in bf16, and copies in fp8 of what matrix
products take."""


@dataclass(frozen=True)
class Assumptions:
    """Inputs of a plan that a config does not hold.

    Args:
        imbalance: rows of the busiest rank's experts over the average (1: even routing).
        fragmentation: share of all tensors at the peak that the allocator wastes.
        fused: kernels of TransformerEngine or torch's own.
        memory_imbalance: the least imbalance that memory has to hold: time follows the usual
            step, memory the worst one.
    """

    imbalance: float = 1.0
    fragmentation: float = 0.02
    fused: bool = True
    memory_imbalance: float = 1.0

    def for_memory(self) -> Assumptions:
        """The same with the imbalance that memory has to hold."""
        return replace(self, imbalance=max(self.imbalance, self.memory_imbalance))


@dataclass(frozen=True)
class Shapes:
    """Counts of tokens and widths of a rank, in the letters of the module's docstring."""

    T: int
    N: int
    A: int
    K: int
    R: float
    H: int
    Q: int
    G: int
    D: int
    U: int
    P: int
    C: int
    n: int
    E: int
    F: int
    W: int
    V: int
    b: int
    s: int
    t: int
    c: int
    x: int
    local_experts: int
    fused: bool
    span: bool
    qk_norm: str
    groups: int = 0
    """Expert groups of group-limited routing; 0: none."""
    groups_per_token: int = 0

    @property
    def busiest(self) -> float:
        """Rows of the busiest rank over the average."""
        return self.R / (self.N * self.K * self.x)

    @property
    def packed_row(self) -> int:
        """w: bytes of a row and its probability in the spanning exchange (model/span/packing),
        H b + 4 up to the next multiple of 16.
        """
        return -(-(self.H * self.b + 4) // 16) * 16

    def dense(self, width: int) -> Shapes:
        """The shapes of a layer without router and experts, whose SwiGLU is `width` wide in all.

        It has the place of a shared expert: W is its width on a rank.
        """
        return replace(self, E=0, K=0, R=0.0, F=0, W=width // self.t, local_experts=0)


def capacity_factor(config: Config, assumptions: Assumptions) -> float:
    """Rows of a rank's experts over the even share: capacity limits what imbalance adds."""
    router = config.model.router
    if router.capacity_factor is None:
        return assumptions.imbalance
    if router.pad_to_capacity:
        return router.capacity_factor
    return min(assumptions.imbalance, router.capacity_factor)


def shapes(config: Config, layout: Layout, vocab: int, assumptions: Assumptions) -> Shapes:
    """Shapes of `config` in `layout`, for a vocabulary of `vocab` tokens.

    Under ``placement=span`` R counts the rows of all stages of one tick together.
    """
    model, tensor = config.model, layout.tensor
    attended = config.data.sequence * config.batch.micro // layout.context
    tokens = attended // tensor
    factor = capacity_factor(config, assumptions)
    query, keys = model.query_width // tensor, max(model.kv_width // tensor, model.kv_channels)
    # A rank with fewer experts than all of them receives as many rows as it sends, on average.
    rows = tokens * model.experts_per_token * layout.expert_tensor
    return Shapes(
        T=config.data.sequence // layout.context,
        N=tokens,
        A=attended,
        K=model.experts_per_token,
        R=rows * (factor if layout.expert > 1 or model.router.pad_to_capacity else 1.0),
        H=model.hidden,
        Q=query,
        G=keys,
        D=model.kv_channels,
        U=model.output_width // tensor,
        P=model.projection_weights // tensor if model.latent else model.hidden * 2 * (query + keys),
        C=model.latent_width,
        n=model.heads // tensor,
        E=model.experts,
        F=model.expert_hidden // layout.expert_tensor,
        W=model.shared_expert_hidden // tensor,
        V=padded_vocab(vocab, model.vocab_multiple) // tensor,
        b=DTYPE_BYTES[config.dtype],
        s=1 if config.dtype == "fp8" else DTYPE_BYTES[config.dtype],
        t=tensor,
        c=layout.context,
        x=layout.expert_tensor,
        local_experts=model.experts // layout.expert,
        fused=assumptions.fused,
        span=layout.span,
        qk_norm=model.qk_norm,
        groups=(model.router.groups or 0) if model.router.groups_per_token else 0,
        groups_per_token=model.router.groups_per_token or 0,
    )
