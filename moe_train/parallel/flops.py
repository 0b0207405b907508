"""Floating-point operations of a training step, and the share of the peak that is reached.

Counted as in PaLM (arXiv:2204.02311, appendix B) and Megatron-LM's throughput report: the matrix
multiplications of the model's mathematics only. A multiply-add is 2 operations, the backward pass
costs twice the forward one, and recomputed activations do not count (that would be "hardware
utilisation"). Unlike PaLM's 12*L*H*Q*T, attention scores are counted under the causal mask: a token
looks at (T + 1) / 2 keys on average. Capacity padding and dropped tokens are not modelled.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from moe_train.config.model import ModelConfig
from moe_train.parallel.parameters import mtp_parameters

MULTIPLY_ADD = 2
FORWARD_AND_BACKWARD = 3
"""Backward needs the gradient of the inputs and of the weights: twice the forward pass."""


@dataclass(frozen=True)
class FlopsPerToken:
    """Training operations (forward and backward) per token, over all layers, by part."""

    projections: float
    """Query, key, value and output projections."""
    scores: float
    """Query-key products and the weighted sum of values, causal."""
    router: float
    """Token-to-expert logits."""
    experts: float
    """SwiGLU of the k chosen experts."""
    shared_expert: float
    """SwiGLU of the shared expert."""
    feed_forward: float
    """SwiGLU of dense layers, and the projections of multi-token prediction."""
    head: float
    """Output logits, of every predicted token."""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return float(sum(astuple(self)))


def flops_per_token(model: ModelConfig, sequence: int, vocab: int) -> FlopsPerToken:
    """Count one token's share of a training step.

    Args:
        model: the transformer.
        sequence: tokens per sequence (T); scores grow with it.
        vocab: rows of the output head; the useful ones, without padding.
    """
    weight = FORWARD_AND_BACKWARD * MULTIPLY_ADD  # of one weight that a token passes
    swiglu = 3 * model.hidden  # gate, up and down matrices, per unit of inner width
    layers, moe = model.layers + model.mtp_layers, weight * model.moe_layers
    latent = model.hidden * model.latent_width
    joined = model.mtp_layers * mtp_parameters(model)[0]
    return FlopsPerToken(
        projections=weight * layers * (model.projection_weights + latent),
        scores=weight * layers * (model.query_width + model.output_width) * (sequence + 1) / 2,
        router=moe * model.hidden * model.experts,
        experts=moe * model.experts_per_token * swiglu * model.expert_hidden,
        shared_expert=moe * swiglu * model.shared_expert_hidden,
        feed_forward=weight * (model.dense_layers * swiglu * model.dense_hidden + joined),
        head=weight * (1 + model.mtp_layers) * model.hidden * vocab,
    )


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float | None:
    """Model FLOPs utilisation: the share, 0 to 1, of the peak of all devices together.

    Args:
        tokens_per_second: over all ranks.
        flops_per_token: ``FlopsPerToken.total``.
        peak_flops: FLOP/s of all devices in the compute dtype; 0 where no peak is known.

    Returns:
        None where no peak is known: a share of an unknown would be an invention.
    """
    if peak_flops <= 0:
        return None
    return tokens_per_second * flops_per_token / peak_flops
